import warnings

import pytest

from fastlora.continual.datasets.split import DataError, Images, few_shot, random_split, split_each_class


def images(counts, backwards=False):
    rows = [(f"c{label}/{i:03d}.jpg", label) for label, count in enumerate(counts) for i in range(count)]
    rows = rows[::-1] if backwards else rows
    return Images(tuple(name for name, _ in rows), tuple(label for _, label in rows))


def test_few_shot_is_a_function_of_seed_and_data_set():
    first = few_shot(images([20, 30]), 16, 0, "Food")
    assert first.labels == (0,) * 16 + (1,) * 16 and len(set(first.names)) == 32
    assert few_shot(images([20, 30], backwards=True), 16, 0, "Food") == first  # whatever the order on disk
    for seed, name in ((1, "Food"), (0, "DTD")):
        other = few_shot(images([20, 30]), 16, seed, name)
        assert other != first and other.labels == first.labels


def test_few_shot_of_a_class_does_not_depend_on_the_others():
    assert few_shot(images([20, 30]), 4, 0, "x").names[4:] == few_shot(images([7, 30]), 4, 0, "x").names[4:]


def test_few_shot_with_replacement_only_where_a_class_is_short():
    with pytest.warns(UserWarning, match=r"x: 1 of 2 classes have fewer than 16 .*the least 3.; .* with replacement"):
        drawn = few_shot(images([3, 16]), 16, 0, "x")
    assert drawn.labels == (0,) * 16 + (1,) * 16
    assert len(set(drawn.names[:16])) <= 3 and len(set(drawn.names[16:])) == 16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        few_shot(images([3, 16]), 3, 0, "x")


def test_drawn_split_is_80_to_20():
    train, test = random_split(images([6, 5]))
    assert (len(train.names), len(test.names)) == (8, 3) and not set(train.names) & set(test.names)


def test_split_of_each_class():
    train, test = split_each_class(images([10, 2, 5]), 0.8, "mine")
    assert [train.labels.count(label) for label in range(3)] == [8, 1, 4]
    assert [test.labels.count(label) for label in range(3)] == [2, 1, 1]
    assert not set(train.names) & set(test.names)
    assert split_each_class(images([10, 2, 5]), 0.99, "mine")[1].labels == (0, 1, 2)
    with pytest.raises(DataError, match="c1/000.jpg is the only image of its class"):
        split_each_class(images([10, 1]), 0.8, "mine")
