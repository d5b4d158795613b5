from __future__ import annotations

from dp_flash_hf.reporting.text import WIDTH, page


def test_long_texts_are_wrapped_under_their_first_line() -> None:
    words = " ".join(["word"] * 60)
    lines = page("Title", [("label", words), ("longer", "short")], [words]).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert lines[0] == "Title"
    assert lines[1].startswith("  label      word")
    assert lines[2].startswith(" " * 13 + "word")
    assert lines[lines.index("Not covered") - 1] == "  longer     short"
    first, *rest = lines[lines.index("Not covered") + 1 :]
    assert first.startswith("  - word")
    assert all(line.startswith("    word") for line in rest)
    assert " ".join(" ".join(lines).split()).count("word") == 120
