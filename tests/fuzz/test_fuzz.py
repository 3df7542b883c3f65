"""The short form of `python -m tests.fuzz`: fixed seeds, a few seconds."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.dataset.manifest import open_dataset
from data_prep.errors import UserError
from data_prep.io.hashes import sha256_json
from data_prep.io.json import parse_json
from tests.fuzz.driver import Child, Summary, child, fuzz
from tests.fuzz.targets import TARGETS

ROUNDS = 2


@pytest.fixture(scope="module")
def process() -> Iterator[Child]:
    with child() as process:
        yield process


@pytest.mark.slow
def test_no_case_fails(process):
    summary = fuzz(process, {name: target.weight for name, target in TARGETS.items()}, seed=0, rounds=ROUNDS)
    assert summary.failures == [], summary.text()
    for name, counts in summary.outcomes.items():
        assert sum(counts.values()) == ROUNDS * TARGETS[name].weight
    worked, refused = (sum(counts[o] for counts in summary.outcomes.values()) for o in ("worked", "refused"))
    assert worked > 5  # the material is whole where it is not damaged
    assert refused > 15


def failed(process: Child, fault: str) -> str:
    outcome, detail = process.run(fault, "0:7")
    assert outcome == "failed"
    summary = Summary()
    summary.add(fault, "0:7", outcome, detail)
    assert f"--target {fault} --case 0:7" in summary.text()
    return detail


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "says"), [("raise", "KeyError"), ("memory", "MemoryError"), ("left", "partial")])
def test_cases_that_fail_are_seen(fault, says, process):
    assert says in failed(process, fault)


@pytest.mark.slow
def test_crashes_and_hangs_are_seen_and_the_next_case_runs():
    with child(hang_s=5) as process:
        assert "ended with -11" in failed(process, "crash")
        assert "no answer within 5" in failed(process, "hang")
        assert process.run("cache", "0:0") == ("worked", "")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.slow
@settings(
    max_examples=100, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(data=st.data())
def test_a_manifest_with_any_value_anywhere(data, digits, tmp_path_factory):
    content = json.loads((digits / "manifest.json").read_text())
    content[data.draw(st.sampled_from(sorted(content)))] = data.draw(VALUES)
    del content["checksum"]
    try:
        content["checksum"] = sha256_json(content)
    except ValueError:  # NaN has no hash, and is no JSON
        content["checksum"] = "0" * 64
    folder = tmp_path_factory.mktemp("manifest")
    (folder / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as error:  # at last its files are missing
        open_dataset(folder)
    assert str(error.value).isprintable()


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(
    st.binary(max_size=60)  # an alphabet of JSON's own: likelier to get far, and drawn in a tenth of the time
    | st.text('{}[]":,.+-eE0129 \\untrufalsé\ud800\x00\n', max_size=60).map(lambda t: t.encode(errors="surrogatepass"))
)
def test_json_is_read_or_is_a_value_error(content):
    try:
        value = parse_json(content)
    except ValueError:
        return
    json.dumps(value, allow_nan=False)
