"""The pages of the loss presets: what they say is what the code does, and their commands are accepted."""

from __future__ import annotations

import json
import math
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.staleness import pages
from bench.staleness.pages import Run, fields_block, fill, measured_block, read_runs
from bench.staleness.pulls import PICTURES, Case, draw, pulls
from bench.staleness.report import BASELINE
from cod_async.config.check_loss import loss_problems
from cod_async.config.load import load_config
from cod_async.config.presets import PRESETS, preset_values
from cod_async.config.schema import LossConfig

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "docs" / "losses"
SECTIONS = ["What it does to a token", "Fields", "When", "What to watch", "Measured"]
MAX_PICTURE_BYTES = 60_000


def page(preset: str) -> str:
    return (FOLDER / f"{preset}.md").read_text()


def between(text: str, name: str) -> str:
    return text.split(f"<!-- {name}: begin -->")[1].split(f"<!-- {name}: end -->")[0].strip()


def test_there_is_a_page_for_each_preset_and_no_other() -> None:
    assert {path.stem for path in FOLDER.glob("*.md")} == {"README", *PRESETS}
    index = (FOLDER / "README.md").read_text()
    assert re.findall(r"^\| \[`(\w+)`\]\(\1\.md\) \|", index, re.MULTILINE) == list(PRESETS)
    assert not (ROOT / "docs" / "losses.md").exists()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_page_has_its_parts(preset: str) -> None:
    text = page(preset)
    assert text.startswith(f"# `{preset}`\n")
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == SECTIONS
    assert re.search(
        r"\(arXiv \d{4}\.\d{5}|slime|`tis_token`|preset|truncated importance", text, re.IGNORECASE
    )


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.md")), ids=lambda path: path.stem)
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text()
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert (path.parent / link).exists(), link
    for link, anchor in re.findall(r"\]\(([\w/.]*\.md)#([\w-]+)\)", text):
        titles = re.findall(r"^#+ (.+)$", (path.parent / link).read_text(), re.MULTILINE)
        assert anchor in [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]


@pytest.mark.parametrize("preset", PRESETS)
def test_the_fields_are_those_of_the_preset(preset: str) -> None:
    said, bold = {}, set()
    for line in between(page(preset), "fields").splitlines()[2:]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        for name, value in zip(cells[::2], cells[1::2], strict=True):
            if name:
                said[name.strip("*`")] = json.loads(value.strip("*`"))
                bold |= {name.strip("*`")} if name.startswith("**") else set()
    assert said == preset_values(preset)
    assert bold == set(PRESETS[preset])
    assert between(page(preset), "fields") == fields_block(preset)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_command_on_a_page_is_accepted(preset: str) -> None:
    commands = re.findall(r"^cod train CONFIG (.+)$", page(preset), re.MULTILINE)
    assert commands
    for command in commands:
        overrides = [part.strip() for part in command.split("--set") if part.strip()]
        config = load_config([ROOT / "configs" / "quickstart.toml"], overrides)
        assert list(loss_problems(config)) == []
        for override in overrides:
            key, value = override.split("=")
            found: Any = config
            for part in key.split("."):
                found = getattr(found, part)
            assert str(found).lower() == value or math.isclose(float(found), float(value))


@pytest.mark.parametrize("preset", PRESETS)
def test_the_picture_is_there_and_small(preset: str) -> None:
    path = ROOT / "docs" / "images" / "losses" / f"{preset}.png"
    assert f"](../images/losses/{preset}.png)" in page(preset)
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) < MAX_PICTURE_BYTES
    width, height = struct.unpack(">II", data[16:24])
    assert 600 <= width <= 1000 and 200 <= height <= 500


def test_a_picture_is_drawn_whole(tmp_path: Path) -> None:
    draw("topr", tmp_path / "images" / "topr.png")
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["topr.png"]
    assert (tmp_path / "images" / "topr.png").stat().st_size < MAX_PICTURE_BYTES


def expected(preset: str, case: Case, rho: float, a: float) -> float:
    """Return the pull of a token alone in its segment, or among companions, by the formulas of the pages."""
    up, clip = a > 0, rho <= 1.2 if a > 0 else rho >= 0.8
    if preset in ("paper", "ppo"):
        return a * clip * (1 if preset == "paper" else rho)
    if preset in ("decoupled", "tis_token", "tis_segment", "icepop", "geo_mask") and case.is_later:
        return a * rho * clip
    if preset == "decoupled":
        return a * rho * (rho <= 5)
    if preset == "a3po":
        d = max(case.lag, 1)
        step, w = rho ** (1 / d), rho ** ((d - 1) / d)
        return a * rho * (step <= 1.2 if up else step >= 0.8) * (w <= 5)
    if preset in ("tis_token", "tis_segment"):
        return a * min(rho, 2)
    if preset == "icepop":
        return a * rho * (0.5 <= rho <= 5)
    if preset == "geo_mask":
        return a * min(rho, 5) * (math.exp(case.companions[0]) < 1.2)
    if preset == "gspo":
        return a * rho * (rho <= 1 + 4e-4 if up else rho >= 1 - 3e-4)
    if preset == "cispo":
        return a * min(rho, 1.2)
    if preset == "dppo_tv":
        moved = case.probability * (rho - 1)
        return a * rho * (moved <= 0.2 if up else moved >= -0.2) - 0.002 * math.log(rho)
    if preset == "topr":
        return a if up else a * min(rho, 1)
    if preset == "opsm":
        return a * rho * clip * (up or case.companions[0] > 0)
    assert preset == "opd"
    return math.log(case.teacher / rho)


@pytest.mark.parametrize("preset", [preset for preset in PRESETS if preset != "m2po"])
def test_the_lines_are_those_of_the_formula(preset: str) -> None:
    loss = LossConfig(preset=preset)  # type: ignore[arg-type]
    for case in PICTURES[preset].cases:
        ratios = [
            r for r in (0.13, 0.45, 0.7, 0.9, 1.1, 1.3, 1.9, 3.0, 4.5, 7.9) if r * case.probability <= 1
        ]
        for advantage in (1.0, -1.0):
            truth = [expected(preset, case, ratio, advantage) for ratio in ratios]
            np.testing.assert_allclose(pulls(loss, ratios, advantage, case), truth, rtol=1e-9, atol=1e-12)


def test_the_steps_of_m2po_clip_nothing_outliers_or_all_beyond_the_least_range() -> None:
    """The bound of a step of normal log-ratios, from their quantiles; the probe is one of 2001."""
    loss, ratios = LossConfig(preset="m2po"), [0.2, 0.6, 0.75, 1.45, 1.55, 7.0]
    quiet, between_them, loud = (pulls(loss, ratios, 1.0, case) for case in PICTURES["m2po"].cases)
    np.testing.assert_allclose(quiet, ratios, rtol=1e-12)
    np.testing.assert_allclose(loud, [0.2, 0.6, 0.75, 1.45, 0, 0], rtol=1e-12)
    np.testing.assert_allclose(between_them, [0.2, 0.6, 0.75, 1.45, 1.55, 0], rtol=1e-12)
    negative = pulls(loss, ratios, -1.0, PICTURES["m2po"].cases[2])
    np.testing.assert_allclose(negative, [0, 0, -0.75, -1.45, -1.55, -7.0], rtol=1e-12)


def test_without_correction_every_token_pulls_alike() -> None:
    ratios = [0.125, 1.0, 8.0]
    np.testing.assert_allclose(pulls(LossConfig(clip="none"), ratios, -0.5, Case("")), [-0.5] * 3, rtol=1e-12)


def run_of(lag: int, late: float | None, **values: Any) -> Run:
    given: dict[str, Any] = {
        "world": "door", "recipe": "ppo", "lag": lag, "seed": 0, "lr": 5e-4, "num_eval_packs": 128,
        "outcome": "learned", "late": late, "steps_to_bar": 60, "deepest_fall": 0.04,
        "medians": {"kl_drift_per_version_nats": 1e-3 * lag, "masked_frac": 0.02}, "ess_frac_lowest": 0.5,
    }  # fmt: skip
    return Run(**given | values)


def test_what_is_measured_is_said_plainly() -> None:
    runs = [
        run_of(0, 0.98),
        run_of(0, 0.96, seed=1),
        run_of(4, 0.3, outcome="unlearned"),
        run_of(4, 0.9, seed=1, steps_to_bar=80),
        run_of(8, 0.41, outcome="slow", steps_to_bar=None, ess_frac_lowest=0.007),
        run_of(16, 0.97, deepest_fall=0.3),
        run_of(32, None, outcome="stopped", steps_to_bar=None),
        run_of(4, 0.95, recipe="paper"),
        run_of(4, 0.1, lr=1e-3),
        run_of(0, 0.99, num_eval_packs=512, seed=7),
        run_of(16, 0.97, num_eval_packs=512, seed=7),
        run_of(16, 0.5, num_eval_packs=512, seed=8),  # without its equal at lag 0
        run_of(0, 0.95, num_eval_packs=512, seed=9),
        run_of(16, 0.4, num_eval_packs=512, seed=9, outcome="unlearned"),
        run_of(0, 0.61, world="cross", recipe="ppo loss.dual_clip=3.0"),
    ]
    text = measured_block("ppo", runs)
    rows: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("|"):
            name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            rows.setdefault(name, cells)
    assert rows["late reward at the end"] == [".97", "**.60**", "**.41**", ".97", "**.00**"]
    assert rows["runs, of them at the bar"] == ["2, 2", "2, 1", "1, 0", "1, 1", "1, 0"]
    assert rows["steps to the bar"] == ["60", "70", "never", "60", "never"]
    assert rows["KL drift per version, mnats"] == ["0.00", "4.00", "8.00", "16.00", "32.00"]
    assert rows["`masked_frac`, %"] == ["2.0"] * 5
    assert rows["lowest `ess_frac` of a step"] == ["0.500", "0.500", "0.007", "0.500", "0.500"]
    assert rows["`paper`, late reward (runs)"] == ["-", ".95 (1)", "-", "-", "-"]
    assert rows["*Cross*, bar .50"] == ["lag 0"]
    assert rows["`loss.dual_clip=3.0`: late reward at the end"] == [".61"]
    assert "5 of 8 runs ended at the bar or above" in text and "one seed's luck" not in text
    assert "- Collapsed after having reached the bar: lag 4 seed 0 (.30)." in text
    assert "- Never reached the bar: lag 8 seed 0 (.41)." in text
    assert "below the same seed at lag 0: lag 4 seed 1 (.90)." in text
    assert "- Fell by more than 15 points on the way and came back: lag 16 seed 0 (.97)." in text
    assert "- Stopped by numbers that are not finite: lag 32 seed 0 (.00)." in text
    assert "2 seeds, late reward .97 (worst .95) at lag 0 and .69 (worst .40) at lag 16; 1 of" in text
    assert "one seed's luck" in measured_block("paper", runs)
    assert measured_block("gspo", runs) == "No runs of it on the grid."


def test_pages_are_those_of_the_committed_runs() -> None:
    """After new results: ``python -m bench.staleness.pages --no-pictures``."""
    path = ROOT / BASELINE
    if not path.exists():
        pytest.skip("the grid has no committed results yet")
    runs = read_runs(path)
    assert runs
    for preset in PRESETS:
        assert between(page(preset), "measured") == measured_block(preset, runs), preset


def test_blocks_need_their_markers() -> None:
    text = "a\n<!-- fields: begin -->\nold\n<!-- fields: end -->\nb\n"
    filled = fill(text, {"fields": "| new |"})
    assert filled == "a\n<!-- fields: begin -->\n\n| new |\n\n<!-- fields: end -->\nb\n"
    assert fill(filled, {"fields": "| new |"}) == filled
    with pytest.raises(ValueError, match="no markers <!-- measured: begin -->"):
        fill(text, {"measured": ""})


@pytest.mark.parametrize("content", [None, "{", "[]", '{"runs": [{"world": "door"}]}', "{}"])
def test_a_file_of_something_else_is_refused(
    tmp_path: Path, content: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "lag.json"
    if content is not None:
        path.write_text(content)
    monkeypatch.setattr("sys.argv", ["pages", "--no-pictures", "--results", str(path)])
    with pytest.raises(SystemExit) as caught:
        pages.main()
    assert caught.value.code == 2
    assert f"--results {path}" in capsys.readouterr().err
