import pytest
from continual.datasets import layouts

from fastlora.continual.datasets import find_images
from fastlora.continual.datasets.split import DataError


@pytest.fixture
def mine(tmp_path):
    """birds/{train,test}/..., and cars/... without sides."""
    for side, count in (("train", 5), ("test", 3)):
        for number, cls in enumerate(("house_sparrow", "Robin")):
            for i in range(count):
                layouts.put(tmp_path / "birds" / side / cls / f"{i}.jpg", number)
    for number, cls in enumerate(("red", "blue", "green")):
        for i in range(10):
            layouts.put(tmp_path / "my" / "cars" / cls / f"{i}.jpg", number)
    (tmp_path / "birds" / ".cache").mkdir()
    (tmp_path / "birds" / "train" / "notes.txt").write_text("stray")
    return tmp_path


@pytest.fixture
def build(mine, config, transforms):
    return lambda tasks, **options: find_images(config("folders", mine, tasks=tasks, **options)).stream(transforms)


def test_tasks_in_order(build):
    cars = {"path": "my/cars", "name": "toy cars", "templates": ["a toy, {}.", "{}"]}
    stream = build(["birds", cars], split=0.8, shots=3)
    assert [task.name for task in stream.tasks] == ["birds", "toy cars"] and stream.name == "folders"
    assert stream.tasks[0].classes == ("Robin", "house sparrow") and stream.tasks[0].templates == ("a photo of a {}.",)
    assert stream.tasks[1].classes == ("blue", "green", "red") and stream.tasks[1].templates == ("a toy, {}.", "{}")
    assert [len(task.test) for task in stream.tasks] == [6, 6]
    assert [len(files) for files in stream.train_files] == [6, 9]
    assert all(file.startswith("train/") for file in stream.train_files[0])
    assert not set(stream.train_files[1]) & set(stream.tasks[1].test.files)


def test_templates_for_all(build):
    assert build(["birds"], templates=["a bird: {}"]).tasks[0].templates == ("a bird: {}",)


def test_an_absolute_path(build, mine):
    assert build([str(mine / "birds")]).tasks[0].name == "birds"


@pytest.mark.parametrize(
    ("change", "tasks", "message"),
    [
        (None, ["fish"], "task 'fish': .*fish is no directory. Correct data.tasks or data.root"),
        (None, ["my/cars"], "has neither train/ nor test/.*--data.split 0.8"),
        ("rm test", ["birds"], "has train/ and no test/"),
        ("extra", ["birds"], "the classes of .*birds differ; train alone has 'Wren'. Make them the same"),
        ("empty", ["birds"], "no images in '.*birds/train/Wren'"),
        ("loose", ["flat"], "has no class folders. It holds images, but no folders"),
    ],
)
def test_faults(build, mine, change, tasks, message):
    import shutil

    if change == "rm test":
        shutil.rmtree(mine / "birds" / "test")
    if change in ("extra", "empty"):
        (mine / "birds" / "train" / "Wren").mkdir()
    if change == "extra":
        layouts.put(mine / "birds" / "train" / "Wren" / "0.jpg")
    if change == "empty":
        (mine / "birds" / "test" / "Wren").mkdir()
    if change == "loose":
        layouts.put(mine / "flat" / "0.jpg")
    options = {"split": 0.5} if change == "loose" else {}
    with pytest.raises(DataError, match=message):
        build(tasks, **options)


def test_tasks_of_one_name(build):
    with pytest.raises(ValueError, match="repeats the task names"):
        build(["birds", "./birds"])
