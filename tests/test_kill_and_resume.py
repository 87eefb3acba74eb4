import kill_and_resume


def test_killed_runs_resume_without_a_loss(tmp_path, capsys):
    """Three of the fifty kills of the script."""
    assert kill_and_resume.main(['--kills', '3', '--epochs', '8', '--out', str(tmp_path / 'kills')]) == 0
    assert '3 kills' in capsys.readouterr().out.splitlines()[-1]
