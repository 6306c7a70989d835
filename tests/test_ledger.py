"""The ledger: nothing is ever counted too few."""

import os
import random
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from perexample import ConfigurationError, PrivacyBudgetError, StaleGradientError
from perexample.privacy import Ledger, Release
from perexample.privacy import ledger as ledger_module

A, B, C = Release(1.0, 0.1), Release(2.0, 0.1), Release(1.0, None)
entries = st.lists(st.sampled_from([A, B, C]), max_size=8)


def book(releases, **options):
    ledger = Ledger(**options)
    for release in releases:
        ledger.record(release)
    return ledger


def flat(ledger):
    return [release for release, count in ledger.runs for _ in range(count)]


@given(entries)
def test_entries_are_kept_in_order_and_joined(releases):
    ledger = book(releases)
    assert flat(ledger) == releases
    assert ledger.steps == len(releases)
    assert all(one[0] != other[0] for one, other in zip(ledger.runs, ledger.runs[1:], strict=False))


@given(entries)
def test_state_round_trip(releases):
    ledger, other = book(releases), Ledger()
    other.load_state_dict(ledger.state_dict())
    assert other.runs == ledger.runs


def test_the_state_is_plain(tmp_path):
    torch.save(book([A, A, C]).state_dict(), tmp_path / "state.pt")
    other = Ledger()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.runs == [(A, 2), (C, 1)]


@given(entries, entries)
def test_what_is_known_beyond_a_state_is_kept_and_other_histories_are_refused(mine, theirs):
    ledger, state = book(mine), book(theirs).state_dict()
    n = min(len(mine), len(theirs))
    if mine[:n] == theirs[:n]:
        ledger.load_state_dict(state)
        assert flat(ledger) == max(mine, theirs, key=len)
    else:
        with pytest.raises(StaleGradientError, match="of different runs"):
            ledger.load_state_dict(state)
        assert flat(ledger) == mine


@settings(max_examples=30)
@given(entries, entries)
def test_a_file_is_continued(tmp_path_factory, first, second):
    path = tmp_path_factory.mktemp("ledger") / "steps.jsonl"
    book(first, path=path)
    again = book(second, path=path)
    assert flat(again) == first + second
    assert flat(Ledger(path)) == first + second


@given(entries)
def test_a_file_takes_up_what_a_state_knows(tmp_path_factory, releases):
    path = tmp_path_factory.mktemp("ledger") / "steps.jsonl"
    Ledger(path).load_state_dict(book(releases).state_dict())
    assert flat(Ledger(path)) == releases


def test_a_reader_does_not_write(tmp_path):
    path = tmp_path / "steps.jsonl"
    book([A], path=path)
    reader = book([B], path=path, write=False)
    assert flat(reader) == [A, B]
    assert flat(Ledger(path)) == [A]


def test_a_line_cut_short_is_of_a_step_never_taken(tmp_path):
    path = tmp_path / "steps.jsonl"
    book([A, B], path=path)
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for length in range(first, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert flat(book([C], path=path)) == [A, C]
        assert flat(Ledger(path)) == [A, C]


@pytest.mark.parametrize("end", [b"", b"\0", b"\r"])
def test_a_whole_entry_counts_though_its_line_has_no_end(tmp_path, end):
    """Editors take off the last end of line, and the step was taken."""
    path = tmp_path / "steps.jsonl"
    book([A, B], path=path)
    path.write_bytes(path.read_bytes().rstrip(b"\n") + end)
    assert flat(Ledger(path, write=False)) == [A, B]
    assert flat(book([C], path=path)) == flat(Ledger(path)) == [A, B, C]


def test_entries_in_one_line_are_refused_and_not_taken_off(tmp_path):
    path = tmp_path / "steps.jsonl"
    book([A, B], path=path)
    joined = path.read_bytes().replace(b"\n", b" ")
    for content in (joined, joined + b'{"noise_mul'):
        path.write_bytes(content)
        with pytest.raises(ConfigurationError, match="line 1 is no entry of a ledger"):
            Ledger(path)
        assert path.read_bytes() == content


def test_a_file_without_an_end_that_is_no_ledger_is_left_alone(tmp_path):
    path = tmp_path / "other.txt"
    path.write_text("notes of somebody")
    with pytest.raises(ConfigurationError, match=r"other\.txt.*line 1 is no entry of a ledger"):
        Ledger(path)
    assert path.read_text() == "notes of somebody"


@pytest.mark.parametrize("zeros", [1, 30])
def test_zeros_that_a_disk_has_in_place_of_an_entry_are_taken_off(tmp_path, zeros):
    path = tmp_path / "steps.jsonl"
    book([A], path=path)
    path.write_bytes(path.read_bytes() + bytes(zeros))
    assert flat(book([B], path=path)) == flat(Ledger(path)) == [A, B]


def test_numbers_of_numpy_are_written_as_those_of_python(tmp_path):
    path = tmp_path / "steps.jsonl"
    book([Release(np.float32(0.5), np.float64(0.25))], path=path)
    assert flat(Ledger(path)) == [Release(0.5, 0.25)]


@pytest.mark.parametrize("line", ["not json", "3", "{}", '{"noise_multiplier": 1.0}', '{"noise_multiplier": "x"}'])
def test_other_files_are_refused(tmp_path, line):
    path = tmp_path / "other.txt"
    path.write_text(line + "\n")
    with pytest.raises(ConfigurationError, match=r"other\.txt.*line 1 is no entry of a ledger"):
        Ledger(path)


def test_the_limit():
    ledger = book([A, A], limit=2)
    with pytest.raises(PrivacyBudgetError, match="The 2 steps that were planned have been taken"):
        ledger.record(A)
    assert ledger.steps == 2
    late = Ledger(limit=1)
    late.load_state_dict(ledger.state_dict())
    with pytest.raises(PrivacyBudgetError):
        late.record(A)


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "3"])
def test_limits_without_meaning(limit):
    with pytest.raises(ConfigurationError, match=r"Ledger\(limit=\.\.\.\)"):
        Ledger(limit=limit)


def test_an_entry_is_forced_to_the_disk_before_record_returns(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr("perexample.privacy.ledger.names_to_disk", lambda folder: None)  # a test of its own
    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append(os.fstat(descriptor).st_size))
    book([A, B], path=tmp_path / "steps.jsonl")
    assert len(done) == 2
    assert 0 < done[0] < done[1] == (tmp_path / "steps.jsonl").stat().st_size


def test_the_name_of_a_new_file_is_forced_to_the_disk_too(tmp_path, monkeypatch):
    forced = []
    monkeypatch.setattr("perexample.privacy.ledger.names_to_disk", forced.append)
    book([A, B], path=tmp_path / "steps.jsonl")
    assert forced == [tmp_path]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt("disk full")], ids=["full", "interrupted"])
@pytest.mark.parametrize("before", [[], [A]])
def test_an_entry_that_cannot_be_written_leaves_no_half_line(tmp_path, monkeypatch, before, error):
    path = tmp_path / "steps.jsonl"
    ledger = book(before, path=path)

    def full(_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(type(error), match="disk full"):
            ledger.record(B)
    assert flat(ledger) == flat(Ledger(path)) == before
    ledger.record(C)
    assert flat(Ledger(path)) == [*before, C]


def test_a_file_that_somebody_else_writes_to(tmp_path):
    """Two trainings that were begun on one file would each count its own steps, and both spend the budget."""
    path = tmp_path / "steps.jsonl"
    one, other = Ledger(path), Ledger(path)
    one.record(A)
    one.record(A)
    with pytest.raises(StaleGradientError, match=r"was written to by somebody else: it has \d+ bytes.* left it with 0"):
        other.record(B)
    with pytest.raises(StaleGradientError, match="written to by somebody else"):
        other.load_state_dict({"runs": [[2.0, 0.5, 3]]})
    one.record(A)
    again = Ledger(path)
    again.record(A)
    assert again.steps == 4
    with pytest.raises(StaleGradientError, match="written to by somebody else"):
        one.record(A)
    path.write_text("")
    with pytest.raises(StaleGradientError, match="it has 0 bytes"):
        again.record(A)


def test_the_error_of_a_file_that_cannot_be_made_is_its_own(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path / "steps.jsonl")

    def refuse(*_, **__):
        raise PermissionError("read-only")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(PermissionError, match="read-only"):
        ledger.record(A)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_file_that_somebody_else_writes_to_at_the_same_time(tmp_path, monkeypatch, when):
    """Another entry between the look at the file and the own entry, or just after it, is seen before the step."""
    path = tmp_path / "steps.jsonl"
    ledger, append = Ledger(path), ledger_module._append

    def beside(to, releases):
        if when == "before":
            append(to, [B])
        added = append(to, releases)
        if when == "after":
            append(to, [B])
        return added

    ledger.record(A)
    with monkeypatch.context() as patch:
        patch.setattr(ledger_module, "_append", beside)
        with pytest.raises(StaleGradientError, match="written to by somebody else"):
            ledger.record(C)
    assert ledger.steps == 1
    assert sorted(flat(Ledger(path)), key=repr) == sorted([A, B, C], key=repr)


@pytest.mark.parametrize(
    ("runs", "text"),
    [
        ([[1.0, 0.1, 3], [1.0, 0.1, -2]], "count .* 1 or more.* -2"),
        ([[1.0, 0.1, 0.5]], r"count .* 0\.5"),
        ([[1.0, 0.1, float("nan")]], "count .* nan"),
        ([[1.0, 0.1, None]], "count .* None"),
        ([[1.0, 0.1]], "'runs' in the state of a Ledger must be triples"),
        (None, "'runs' in the state of a Ledger must be triples"),
        (5, "'runs' in the state of a Ledger must be triples"),
    ],
)
def test_states_without_meaning(runs, text):
    ledger = book([A])
    with pytest.raises(ConfigurationError, match=text):
        ledger.load_state_dict({"runs": runs})
    assert flat(ledger) == [A]


@pytest.mark.parametrize("seed", range(3))
def test_killed_while_writing(tmp_path, seed):
    """A process that says what it is about to do and what it has done, killed from outside."""
    script = """
        import sys
        from perexample.privacy import Ledger, Release
        ledger = Ledger(sys.argv[1])
        while True:
            ledger.record(Release(1.0, 0.5))
            print(ledger.steps, flush=True)
    """
    path = tmp_path / "steps.jsonl"
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(path)], stdout=subprocess.PIPE, text=True
    ) as process:
        for _ in range(random.Random(seed).randrange(1, 60)):
            line = process.stdout.readline()
        process.kill()
        rest = process.stdout.read().split()
    taken = int((rest or [line])[-1])
    assert taken <= Ledger(path).steps <= taken + 1
