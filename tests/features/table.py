"""The table: which rows a run proves, how they are written, and whether a text claims more or less than that."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from .catalogue import Feature
from .run import Proof, Run

BEGIN, END = "<!-- features -->", "<!-- /features -->"
HEADER = ["| | Feature | How | CPU | GPU |", "|---|---|---|---|---|"]
TESTED, TESTED_ON, COMPILED_FOR, NOT_RUN = "tested", "tested on ", "compiled for ", "not yet run"
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "gfx942")  # as they are listed; any others come after


@dataclass(frozen=True)
class Row:
    """A row's cells. `gpu` is empty where the GPU has no part in the feature."""

    area: str
    feature: str
    how: str
    cpu: str
    gpu: str

    @property
    def name(self) -> str:
        return f"{self.area}: {self.feature}"

    def claims(self) -> set[str]:
        """What the row says to somebody who believes it."""
        claims = {f"how {self.how}", f"CPU {self.cpu}"} - {"CPU "}
        if not self.gpu:
            return claims | {"GPU has no part"}
        for part in self.gpu.split("; "):
            if part != NOT_RUN:
                prefix = next((each for each in (TESTED_ON, COMPILED_FOR) if part.startswith(each)), "")
                claims |= {f"GPU {prefix}{item}" for item in part.removeprefix(prefix).split(", ")}
        return claims


def rows(catalogue: Mapping[str, Sequence[Feature]], run: Run, gpu_runs: Iterable[Run] = ()) -> list[Row]:
    """The rows that `run` proves, in the catalogue's order; `gpu_runs` add what they prove on their GPUs.

    A feature is proven when a test of it passed and none failed. One whose tests were all skipped for want of a GPU is a row
    that says so.
    """
    proofs = {(proof.area, proof.feature): proof for proof in run.features}
    on_gpus: dict[tuple[str, str], list[str]] = {}
    for gpu_run in gpu_runs:
        for proof in gpu_run.features:
            if gpu_run.gpu and proof.passed_on_gpu and not proof.failed_on_gpu:
                on_gpus.setdefault((proof.area, proof.feature), []).append(gpu_run.gpu)
    found = []
    for area, features in catalogue.items():
        for feature in features:
            key = area, feature.name
            proof = proofs.get(key, Proof(area=area, feature=feature.name))
            gpus = sorted(set(on_gpus.get(key, ())))
            waits = not proof.passed and proof.skipped == proof.needs_gpu > 0
            if not proof.failed and (proof.passed or waits or gpus):
                cpu = TESTED if proof.passed else ""
                found.append(Row(area, feature.name, feature.how, cpu, gpu_cell(feature, run, gpus)))
    return found


def gpu_cell(feature: Feature, run: Run, gpus: Sequence[str]) -> str:
    targets = compiled_targets(feature.kernels or (), run.variants)
    parts = [TESTED_ON + ", ".join(gpus)] if gpus else []
    parts += [COMPILED_FOR + ", ".join(targets)] if targets else []
    return "; ".join(parts) or ("" if feature.kernels is None else NOT_RUN)


def compiled_targets(kernels: Sequence[str], variants: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Targets that each kernel, a regular expression for names of variants, has a variant for, all of which compiled."""
    matching = [[ends for name, ends in variants.items() if re.search(kernel, name)] for kernel in kernels]
    known = {target for found in matching for ends in found for target in ends}
    chosen = []
    for target in known:
        outcomes = [[ends[target] for ends in found if target in ends] for found in matching]
        if all(each and set(each) == {"passed"} for each in outcomes):
            chosen.append(target)
    return sorted(chosen, key=lambda target: (TARGETS.index(target) if target in TARGETS else len(TARGETS), target))


def as_markdown(found: Iterable[Row]) -> str:
    lines, last = [*HEADER], None
    for row in found:
        area = "" if row.area == last else f"**{row.area}**"
        last = row.area
        lines.append("| " + " | ".join((area, row.feature, row.how, row.cpu, row.gpu)) + " |")
    return "\n".join(re.sub(r"  +", " ", line) for line in lines)


def block(text: str) -> tuple[int, int] | None:
    """Where the table is in a text: between its markers. None: there are no markers.

    Raises:
        ValueError: there are some, but not one pair.
    """
    begins, ends = ([found.end() for found in re.finditer(rf"^{marker}\n", text, re.M)] for marker in (BEGIN, END))
    if not begins and not ends:
        return None
    if len(begins) != 1 or len(ends) != 1 or ends[0] < begins[0]:
        raise ValueError(f"the text has no single table between {BEGIN} and {END}")
    return begins[0], ends[0] - len(END) - 1


def replace(text: str, table: str) -> str:
    """
    Raises:
        ValueError: the text has no place for a table.
    """
    place = block(text)
    if place is None:
        raise ValueError(f"the text has no lines {BEGIN} and {END}")
    return f"{text[: place[0]]}\n{table}\n\n{text[place[1] :]}"


def parse(text: str) -> list[Row]:
    """The rows of the table in a text; none where it has no markers.

    Raises:
        ValueError: what is between the markers is no such table.
    """
    place = block(text)
    return list(parse_lines(text[slice(*place)].split("\n"))) if place else []


def parse_lines(lines: Iterable[str]) -> Iterator[Row]:
    filled = [line for line in lines if line.strip()]
    if filled and filled[:2] != HEADER:
        raise ValueError(f"the table's head is not {HEADER[0]}")
    area = ""
    for line in filled[2:]:
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)]
        if len(cells) != 7 or cells[0] or cells[-1]:
            raise ValueError(f"not a row of the table: {line}")
        area = cells[1].strip("*") or area
        yield Row(area, *cells[2:6])


def untried(catalogue: Mapping[str, Sequence[Feature]], run: Run) -> dict[str, str]:
    """Names of rows whose tests were all skipped, as they may be where there is not what they need, with what that is."""
    proofs = {(proof.area, proof.feature): proof for proof in run.features}
    found = {}
    for area, features in catalogue.items():
        for feature in features:
            proof = proofs.get((area, feature.name))
            if feature.needs and proof is not None and proof.skipped and not proof.passed and not proof.failed:
                found[f"{area}: {feature.name}"] = feature.needs
    return found


def excess(claimed: Iterable[Row], proven: Iterable[Row]) -> list[str]:
    """Names of rows that claim more than the proven ones of their names, with what that is."""
    known = {row.name: row.claims() for row in proven}
    found = []
    for row in claimed:
        if row.name not in known:
            found.append(row.name)
        elif beyond := row.claims() - known[row.name]:
            found.append(f"{row.name} ({', '.join(sorted(beyond))})")
    return found
