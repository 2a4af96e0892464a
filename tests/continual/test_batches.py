import threading

import torch

from fastlora.continual.batches import (
    all_labels,
    batches,
    epoch_order,
    gather,
    generator_for,
    in_order,
    in_turn,
    parts,
)
from fastlora.continual.distributed import World
from fastlora.continual.stream import InMemoryImages


class OneByOne(torch.utils.data.Dataset):
    """The same items without tensors to index."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.data[index]


def numbered(n):
    return InMemoryImages(
        torch.arange(n, dtype=torch.float32).view(n, 1, 1, 1).expand(n, 3, 2, 2).contiguous(), torch.arange(n)
    )


def test_order_is_a_function_of_seed_task_and_epoch():
    order = epoch_order(50, 0, 1, 0)
    assert sorted(order.tolist()) == list(range(50))
    torch.manual_seed(123)  # the global stream plays no part
    assert torch.equal(order, epoch_order(50, 0, 1, 0))
    others = [epoch_order(50, *key) for key in ((1, 1, 0), (0, 2, 0), (0, 1, 1))]
    assert not any(torch.equal(order, other) for other in others)


def test_purposes_do_not_share_a_stream():
    draws = {
        float(torch.rand((), generator=generator_for(*key)))
        for key in ((0, "a", 1), (0, "b", 1), (0, "a", 2), (1, "a", 1))
    }
    assert len(draws) == 4


def test_every_image_once_per_epoch_and_a_short_last_batch():
    stream = batches(numbered(10), 4, seed=3, task=1)
    epochs = [[next(stream)[1] for _ in range(3)] for _ in range(2)]
    for number, epoch in enumerate(epochs):
        assert [len(labels) for labels in epoch] == [4, 4, 2]
        assert torch.equal(torch.cat(epoch), epoch_order(10, 3, 1, number))


def test_images_belong_to_their_labels():
    images, labels = next(batches(numbered(10), 4, seed=0, task=1))
    assert torch.equal(images[:, 0, 0, 0].long(), labels)


def test_any_dataset_gives_the_same_batch():
    data, indices = numbered(6), torch.tensor([4, 0, 5])
    for got, expected in zip(gather(OneByOne(data), indices), gather(data, indices)):
        assert torch.equal(got, expected) and got.dtype == expected.dtype
    assert list(all_labels(OneByOne(data))) == list(all_labels(data)) == list(range(6))


class Loaded(OneByOne):
    """Makes its batches itself, and tells when."""

    def __init__(self, data):
        super().__init__(data)
        self.loads, self.second = [], threading.Event()

    def load(self, indices, generator=None):
        self.loads.append(indices)
        if len(self.loads) == 2:
            self.second.set()
        return self.data.images[indices], self.data.labels[indices]


def test_the_next_batch_is_made_while_one_is_worked_on():
    data = Loaded(numbered(10))
    given = [torch.tensor([3, 1]), torch.tensor([9]), torch.tensor([0, 4])]
    stream = in_turn(data, given)
    first = next(stream)
    assert data.second.wait(10) and len(data.loads) == 2
    got = [first, *stream]
    assert [labels.tolist() for _, labels in got] == data.loads == [[3, 1], [9], [0, 4]]


def test_processes_have_the_parts_of_the_same_batches():
    """Batches of 4, 4 and 2 images in 3 processes; in the last of them the third has image 0 to compute on, too."""
    data = numbered(10)
    for each in (data, OneByOne(data)):
        whole = batches(each, 4, seed=3, task=1)
        streams = [parts(each, 4, 3, 1, World(rank, 3)) for rank in range(3)]
        for size in (4, 4, 2, 4):
            images, labels = next(whole)
            for rank, (own_images, own_labels, told) in enumerate(map(next, streams)):
                part = World(rank, 3).part(size)
                assert told == size and torch.equal(own_labels, labels[part]) and torch.equal(own_images, images[part])


def test_rows_of_a_data_set():
    found = [labels.tolist() for _, labels in in_order(numbered(10), 4, slice(3, 9))]
    assert found == [[3, 4, 5, 6], [7, 8]]
