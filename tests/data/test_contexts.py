"""contexts.py and its command: what answers share becomes the context, everything else stays."""

from __future__ import annotations

import make_context_pairs
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.commands import exit_code
from helpers.recipes import photo_rows, write_rows
from llava_orpo.data.contexts import split

texts = st.lists(st.text("ab .!?\n", max_size=6), max_size=6).map("".join)


@pytest.mark.parametrize(
    "chosen, rejected, expected",
    [
        ("A cat. It is red. End.", "A cat. It is blue. End.", ("A cat.", "It is red. End.", "It is blue. End.")),
        ("One. Two! Three", "One.  Two!\nFour", ("One. Two!", "Three", "Four")),
        ("It costs 3.5 euros. Yes.", "It costs 3.7 euros. Yes.", None),  # a number is no end of a sentence
        ("A cat is red.", "A cat is blue.", None),
        ("A cat. It is red.", "A cat.", None),  # nothing would be left of one answer
        ("Same. Same.", "Same. Same.", None),
        ("", "A cat.", None),
    ],
)
def test_whole_shared_sentences_are_the_context(chosen, rejected, expected):
    assert split(chosen, rejected) == expected


@given(texts, texts, texts)
def test_nothing_is_lost_and_the_rests_part(shared, first, second):
    answers = f"{shared} {first}", f"{shared} {second}"
    found = split(*answers)
    if found is None:
        return
    context, *rests = found
    for answer, rest in zip(answers, rests, strict=True):
        assert f"{context} {rest}".split() == answer.split() and rest
    assert split(*rests) is None or rests[0].split()[0] != rests[1].split()[0]


def test_the_command_keeps_every_other_column(tmp_path, capsys):
    rows = photo_rows(3, 1)
    for row in rows[:2]:
        row.update(chosen="A photograph. " + row["chosen"], rejected="A photograph. " + row["rejected"])
    write_rows(tmp_path, rows)
    names = tmp_path / "rows.parquet", tmp_path / "new" / "context.parquet"
    assert exit_code(make_context_pairs.main, *names) == 0
    assert "2 pairs with a context; 1 that share no sentence are left out" in capsys.readouterr().out
    before, after = (pq.read_table(tmp_path / name) for name in ("rows.parquet", "new/context.parquet"))
    assert after.column("context").to_pylist() == ["A photograph."] * 2
    for number, row in enumerate(after.to_pylist()):
        original = before.slice(number, 1).to_pylist()[0]
        assert all(row[name] == original[name] for name in original if name not in ("chosen", "rejected"))
        assert f"{row['context']} {row['chosen']}" == original["chosen"]
    assert after.schema.metadata == before.schema.metadata  # datasets still knows which column is the image


@pytest.mark.parametrize(
    "kind, line", [("rows", "begin with the same sentence"), ("text", "cannot be read as parquet")]
)
def test_files_without_such_pairs_are_refused_in_one_line(kind, line, tmp_path, capsys):
    write_rows(tmp_path, photo_rows(2, 1))
    (tmp_path / "text.parquet").write_text("no parquet")
    assert exit_code(make_context_pairs.main, tmp_path / f"{kind}.parquet", tmp_path / "made.parquet") == 1
    said = capsys.readouterr().err
    assert line in said and "Traceback" not in said and not (tmp_path / "made.parquet").exists()
