"""Progress: plain lines for a log, a bar for a terminal."""

import io

from conversion.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(stream, every):
    progress = Progress(stream, every)
    progress.start("vae", 4_000_000_000)
    for _ in range(2):
        progress.tick(1_000_000_000)
    progress.stop()
    progress.stop()
    return stream.getvalue()


def test_lines():
    lines = run(io.StringIO(), every=0).splitlines()
    assert lines[0] == "vae: 4.00 GB"
    assert lines[2].startswith("vae: 2 tensors, 50 %, ")
    assert "MB/s" in lines[2] and lines[2].endswith("s left")


def test_lines_are_rare():
    assert run(io.StringIO(), every=60).splitlines() == ["vae: 4.00 GB"]


def test_a_bar_on_a_terminal():
    text = run(Terminal(), every=60)
    assert "vae" in text and "2 tensors" in text and "/s" in text
