"""Pieces of a page: one HTML file, pictures inside, opens without a network."""

import base64
import html
import io
from collections.abc import Mapping, Sequence

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
img { max-width: 100% } th { text-align: left; font-weight: 600; padding-right: 2rem } td { padding-right: 2rem }
thead th { border-bottom: 1px solid #bbb; white-space: nowrap } table { border-collapse: collapse }
pre { background: #f5f5f5; padding: 1rem; overflow-x: auto }
.wide { overflow-x: auto }
"""


def document(title: str, *parts: str) -> str:
    """The page of these parts, which are HTML; the title is text."""
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title>\n<style>{STYLE}</style>'
    body = "\n".join([f"<h1>{html.escape(title)}</h1>", *parts])
    return f'<!doctype html><html lang="en">{head}\n{body}\n</html>\n'


def picture(figure: Figure, text: str) -> str:
    """The figure as an image, `text` in its place for who cannot see it; closes the figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(text)}" src="data:image/png;base64,{data}">'


def table(pairs: dict) -> str:
    rows = "".join(f"<tr><th>{html.escape(str(k))}<td>{html.escape(str(v))}" for k, v in pairs.items())
    return f"<table>{rows}</table>"


def columns(head: Sequence[str], rows: Mapping[str, Sequence]) -> str:
    """A row for each name, a column for each of `head`, which is HTML."""
    top = "".join(f"<th>{cell}" for cell in ["", *head])
    lines = "".join(
        f"<tr><th>{html.escape(name)}" + "".join(f"<td>{html.escape(str(cell))}" for cell in cells)
        for name, cells in rows.items()
    )
    return f'<div class="wide"><table><thead><tr>{top}</thead><tbody>{lines}</tbody></table></div>'


def points(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(line)}" for line in lines) + "</ul>"
