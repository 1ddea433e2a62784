from pathlib import Path
def test_x(tiny_artifact: Path) -> None:
    assert (tiny_artifact/"dsopt.json").is_file()
    print([ (p.name,p.stat().st_size) for p in tiny_artifact.iterdir()])
