"""A result for a terminal: each number with its interval, and its controls beside it."""

from collections.abc import Mapping, Sequence
from typing import Any

from .benchmark import Benchmark, flatten

#: What a person who reads the table should know of each part.
_TITLES = {
    "text": "by the words of the answer",
    "logits": "by the likelihood of the options",
    "look": "by where it looks",
}
_NUMBER, _INTERVAL = 10, 18


def table(report: Mapping[str, Any], benchmark: Benchmark, everything: bool = False) -> str:
    """The benchmark's main numbers, or `everything`. report: as ``agevlm evaluate`` writes it."""
    model, counts = report["model"], report["counts"]
    lines = [
        f"{report['benchmark']}: {counts['items']} items about {counts['images']} images, "
        f"{report['seconds']:.0f} s",
        f"model {model['path']} ({model['fingerprint']}, {model['fusion']})",
        _asked(report["settings"], report["versions"]),
    ]
    if counts["bad"]:
        lines.append(f"left out as unusable: {counts['bad']}")
        lines += [f"  {problem}" for problem in report["problems"][:20]]
    if counts["images"] and counts["shuffled"] < counts["with_image"]:
        without = counts["with_image"] - counts["shuffled"]
        lines.append(f"shuffled: without {without} items, which had no other image beside theirs")
    controls = report["controls"]
    for way, nested in report["metrics"].items():
        values = flatten(nested)
        shown = [name for name in benchmark.headline if name in values]
        if everything or not shown:
            shown += [name for name in values if name not in shown]
        columns = _columns(controls, way, shown)
        width = max(map(len, [*shown, _TITLES[way]])) + 2
        titles = "".join(f"{title:>{max(_NUMBER, len(title) + 2)}}" for title in columns)
        lines += ["", f"  {_TITLES[way]:<{width}}{'':>{_NUMBER + _INTERVAL}}{titles}".rstrip()]
        for name in shown:
            pair = report["intervals"].get(f"{way}.{name}")
            interval = f"   [{pair[0]:.3f}, {pair[1]:.3f}]" if pair else ""
            said = "".join(c if c.isprintable() else "?" for c in name)  # some come from files
            line = f"  {said:<{width}}{_number(values[name])}{interval:<{_INTERVAL}}"
            for title, found in columns.items():
                value = found.get(name)
                cell = "" if value is None else f"{value:.3f}"
                line += f"{cell:>{max(_NUMBER, len(title) + 2)}}"
            lines.append(line.rstrip())
        if not everything and len(shown) < len(values):
            lines.append(f"  ({len(values) - len(shown)} more with --all)")
    return "\n".join(lines)


def _asked(settings: Mapping[str, Any], versions: Mapping[str, str]) -> str:
    longest = dict.fromkeys((settings["max_tokens"], settings["text_tokens"]))
    shown = ", ".join(
        f"{name} {versions[name]}" for name in ("agevlm-mlx", "mlx") if name in versions
    )
    return (
        f"asked {settings['prompt']!r}, {settings['decoding']}, at most "
        f"{' or '.join(map(str, longest))} tokens; 95 % intervals, each by itself; {shown}"
    )


def _number(value: float | None) -> str:
    return f"{'-' if value is None else f'{value:.3f}':>{_NUMBER}}"


def _columns(
    controls: Mapping[str, Any], way: str, shown: Sequence[str]
) -> dict[str, dict[str, float]]:
    """The controls that have any of the numbers, by the titles of their columns."""
    columns = {}
    for control in ("blind", "shuffled"):
        columns[control] = flatten(controls.get(control, {}).get(way, {}))
    if way != "look":
        constant = {key: flatten(found) for key, found in controls.get("constant", {}).items()}
        if constant:
            # The best of them by the first number that any has: always the same answer gets this
            # for nothing.
            first = next((n for n in shown if any(n in c for c in constant.values())), "")
            best = max(constant, key=lambda key: constant[key].get(first, 0.0))
            columns[f"always {best}"] = constant[best]
        columns["majority"] = flatten(controls.get("majority", {}))
    return {
        title: found for title, found in columns.items() if any(name in found for name in shown)
    }
