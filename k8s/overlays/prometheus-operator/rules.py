"""Writes prometheusrule.yaml, the rules of k8s/monitoring in the operator's format:  python3 rules.py"""

from pathlib import Path

HERE = Path(__file__).parent
RULES = HERE.parent.parent / "monitoring" / "rules.yml"
HEAD = """\
# Made by rules.py from k8s/monitoring/rules.yml: edit that file and run it again.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: chispike
  labels: {app.kubernetes.io/name: chispike, release: prometheus}
spec:
"""


def document() -> str:
    """The PrometheusRule: the rule file's text, indented, without the comments at its top."""
    lines = RULES.read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("groups:"))
    return HEAD + "".join(f"  {line}".rstrip() + "\n" for line in lines[first:])


if __name__ == "__main__":
    (HERE / "prometheusrule.yaml").write_text(document(), encoding="utf-8")
