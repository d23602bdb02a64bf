"""An evaluation's figures as text for a terminal."""

SHOWN = 20  # most classes for a confusion matrix; with more classes, the least recognised are listed
NAME_WIDTH = 24


def table(result: dict) -> str:
    """Everything that `launch.evaluate` found, in a few blocks."""
    blocks = [_header(result), _figures(result), classes_of(result), _layers(result["energy"])]
    return "\n\n".join(blocks)


def grid(rows: list[list[str]]) -> str:
    """Rows in aligned columns: the first column left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *rest in rows:
        words = [first.ljust(widths[0]), *(word.rjust(width) for word, width in zip(rest, widths[1:], strict=True))]
        lines.append("  ".join(words).rstrip())
    return "\n".join(lines)


def percent(ratio: float | None) -> str:
    return "-" if ratio is None else f"{100 * ratio:.2f} %"


def amount(operations: float) -> str:
    """`1234567` as `1.23 M`."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if operations >= size:
            return f"{operations / size:.2f} {unit}"
    return f"{operations:.0f}"


def _header(result: dict) -> str:
    where = f"{result['data']}, split {result['split']}"
    how = f"T={result['T']}, {result['image_size']} pixels, {result['precision']} on {result['device']}"
    step = f"{result['step']}{', averaged weights,' if result['weights'] == 'ema' else ''}"
    return f"{result['run']} after step {step} on {where}: {how}"


def _figures(result: dict) -> str:
    loss = result["eval_loss"]
    rows = [
        ["samples", f"{result['num_samples']}"],
        ["top-1", percent(result["eval_accuracy_ratio"])],
        ["top-5", percent(result["eval_top5_accuracy_ratio"])],
        ["loss", "not finite" if loss is None else f"{loss:.4f} nats"],
        ["energy", f"{result['energy']['microjoule']:.3f} µJ an image, estimated for 45 nm"],
    ]
    return "\n".join(f"{name:<8} {value}" for name, value in rows if value != "-")


def shown(kind: dict) -> str:
    """The name to show for a class of an evaluation; those of older versions have the class name only."""
    return kind.get("display_name", kind["name"])


def _name(name: str) -> str:
    return name if len(name) <= NAME_WIDTH else name[: NAME_WIDTH - 1] + "…"


def classes_of(result: dict) -> str:
    """The confusion matrix; with many classes, the least recognised ones and the most often confused pairs."""
    classes = result["classes"]
    if len(classes) > SHOWN:
        seen = [kind for kind in classes if kind["num_samples"]]
        worst = sorted(seen, key=lambda kind: kind["accuracy_ratio"])[:SHOWN]
        rows = [[_name(shown(kind)), str(kind["num_samples"]), percent(kind["accuracy_ratio"])] for kind in worst]
        least = f"the {len(rows)} least recognised of {len(classes)} classes\n"
        return least + grid([["", "samples", "right"], *rows]) + _confused(result["confused"])
    columns = [str(label) for label in range(len(classes))]
    rows = [["class", *columns, "samples", "right"]]
    for label, (kind, counts) in enumerate(zip(classes, result["confusion"], strict=True)):
        name = kind["name"] if shown(kind) == str(label) else f"{label} {_name(shown(kind))}"
        cells = [str(count) if count else "·" for count in counts]
        rows.append([name, *cells, str(kind["num_samples"]), percent(kind["accuracy_ratio"])])
    return "confusion: a row for each class, a column for each answer\n" + grid(rows)


def _confused(pairs: list[dict]) -> str:
    """The most often confused pairs, where there are too many classes for a confusion matrix."""
    if not pairs:
        return ""
    rows = [
        [_name(pair["class"]), _name(pair["answered"]), str(pair["num_samples"]), percent(pair["of_class_ratio"])]
        for pair in pairs
    ]
    return "\n\nmost often confused\n" + grid([["class", "answer", "samples", "of the class"], *rows])


def _layers(energy: dict) -> str:
    rows = [["layer", "MAC", "AC", "energy, nJ", "input rate", "its neurons", "firing rate"]]
    for layer in energy["layers"]:
        input_rate, firing_rate = layer["input_rate_ratio"], layer["firing_rate_ratio"]
        rows.append(
            [
                layer["layer"],
                amount(layer["macs"]) if layer["macs"] else "-",
                amount(layer["acs"]) if layer["acs"] else "-",
                f"{layer['energy_nanojoule']:.2f}",
                "-" if input_rate is None else f"{input_rate:.4f}",
                layer["neurons"] or "-",
                "-" if firing_rate is None else f"{firing_rate:.4f}",
            ]
        )
    return f"operations for one image, means of {energy['num_samples']} samples\n" + grid(rows)
