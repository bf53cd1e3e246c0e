import pytest

from pipeline.request_log import RequestLog


def test_a_log_opened_again_knows_what_is_done(tmp_path):
    with RequestLog(tmp_path / "log" / "requests.jsonl") as log:
        log.append({"a": {"text": "eins"}, "b": {"text": "zwei\nzeilen"}})
        log.append({"c": {"text": "ü"}})
    with RequestLog(tmp_path / "log" / "requests.jsonl") as log:
        assert log.done == {"a": {"text": "eins"}, "b": {"text": "zwei\nzeilen"}, "c": {"text": "ü"}}
        assert "a" in log and "z" not in log and len(log) == 3


@pytest.mark.parametrize("torn", [b'{"key": "b", "rec', b'{"key": "b", "record": {}}', b"\0\0\0\n", b'{"key": "b"\n'])
def test_a_torn_last_line_is_cut_off_and_the_log_goes_on(tmp_path, torn):
    path = tmp_path / "requests.jsonl"
    with RequestLog(path) as log:
        log.append({"a": {"n": 1}})
    with open(path, "ab") as file:
        file.write(torn)
    with RequestLog(path) as log:
        assert list(log.done) == ["a"]
        log.append({"b": {"n": 2}})
    with RequestLog(path) as log:
        assert log.done == {"a": {"n": 1}, "b": {"n": 2}}


def test_damage_in_the_middle_is_an_error_and_not_forgotten_work(tmp_path):
    path = tmp_path / "requests.jsonl"
    path.write_bytes(b'{"key": "a", "record": {}}\nrubbish\n{"key": "b", "record": {}}\n')
    with pytest.raises(ValueError, match="line 2"):
        RequestLog(path)
