import io

from rich.console import Console

from pipeline.progress import BarDisplay, FileProgress, LineDisplay, ProgressState, duration, read_progress


def test_progress_reaches_the_file_and_notes_are_kept_in_order(tmp_path):
    progress = FileProgress(tmp_path / "progress.json")
    progress.start(total=300, unit="steps", done=100)
    for _ in range(20):
        progress.advance(loss=0.5)
    progress.note("half way")
    progress.close()
    state = read_progress(tmp_path / "progress.json")
    assert (state.unit, state.total, state.done, state.metrics) == ("steps", 300, 120, {"loss": 0.5})
    assert state.notes == ["half way"]
    assert read_progress(tmp_path / "none.json") is None


def test_a_line_tells_rate_metrics_and_time_left_and_counts_resumed_work_out():
    state = ProgressState("steps", 300, 120, done_at_start=100, started=1000.0, moved=1010.0, metrics={"loss": 0.8125})
    assert state.line(now=1010.0) == "120/300 steps  2 steps/s  loss 0.8125  ETA 1m30s"
    assert state.line(now=1200.0).endswith("no news for 3m10s")


def test_durations_read_well():
    assert [duration(seconds) for seconds in (8.34, 59.2, 62, 7500)] == ["8.3s", "59s", "1m02s", "2h05m"]


def test_both_displays_show_each_note_once():
    state = ProgressState("rows", 10, 3, started=1.0, moved=2.0, notes=["first", "second"], notes_made=2)
    for display_type, terminal in ((LineDisplay, False), (BarDisplay, True)):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=160)
        display = display_type(console)
        display.stage_started("generate-math", "1 of 2", "samples")
        display.update(state)
        display.update(state)
        display.stage_finished("done in 3.0s")
        display.close()
        text = console.file.getvalue()
        assert text.count("first") == text.count("second") == 1
        assert "done in 3.0s" in text
