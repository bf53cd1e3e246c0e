import subprocess

import pytest
from rich.console import Console

from pipeline import doctor
from pipeline.doctor import Finding


def test_the_cheap_checks_of_this_machine_pass(tmp_path):
    for finding in (doctor._python(), doctor._memory(), doctor._disk(tmp_path), doctor._compilers()):
        assert finding.ok, finding


@pytest.mark.parametrize(("code", "stdout", "ok"), [
    (0, "generated 4 tokens\n", True), (0, "", False), (1, "half\n", False)])
def test_a_probe_must_say_something_to_pass(code, stdout, ok):
    done = subprocess.CompletedProcess(["probe"], code, stdout, "it broke\n" if code else "")
    finding = doctor._outcome("engine", done, "look there")
    assert finding.ok is ok
    assert finding.detail == ("generated 4 tokens" if ok else "it broke" if code else "the probe ended without a word")


@pytest.mark.parametrize(("needed", "fit"), [(True, False), (False, True)])
def test_only_what_is_needed_decides_and_the_remedy_is_shown(tmp_path, monkeypatch, capsys, needed, fit):
    findings = [Finding("python", True, "3.12"), Finding("thing", False, "not found", "install [thing]", needed)]
    monkeypatch.setattr(doctor, "examine", lambda directory: iter(findings))
    assert doctor.report(tmp_path, Console()) is fit
    assert "-> install [thing]" in capsys.readouterr().out
