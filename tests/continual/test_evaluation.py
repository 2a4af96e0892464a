import pytest
import torch
import torch.nn.functional as F

from fastlora.continual.evaluation import class_embeddings, evaluate
from fastlora.continual.stream import InMemoryImages, Task, TaskStream


def naive_accuracies(model, tokenizer, task, all_tasks):
    """One image, one class, one template at a time, over the whole context."""

    def head(t):
        rows = []
        for name in t.classes:
            features = [model.encode_text(tokenizer([form.format(name)]), normalize=True)[0] for form in t.templates]
            rows.append(F.normalize(torch.stack(features).mean(0), dim=0))
        return rows

    own, right_own, right_union = head(task), 0, 0
    union = [(t.name, i, row) for t in all_tasks for i, row in enumerate(head(t))]
    for image, label in task.test:
        feature = model.encode_image(image[None])[0]
        right_own += max(range(len(own)), key=lambda i: float(own[i] @ feature)) == label
        name, index, _ = max(union, key=lambda entry: float(entry[2] @ feature))
        right_union += (name, index) == (task.name, label)
    return 100 * right_own / len(task.test), 100 * right_union / len(task.test)


@torch.no_grad()
def test_both_label_spaces_and_the_held_out_set(clip, tokenizer, stream):
    result = evaluate(clip, tokenizer, stream, batch_size=7)
    clip.eval()
    expected = [naive_accuracies(clip, tokenizer, task, stream.tasks) for task in stream.tasks]
    assert result.own == pytest.approx([own for own, _ in expected])
    assert result.union == pytest.approx([union for _, union in expected])
    assert result.held_out == pytest.approx(naive_accuracies(clip, tokenizer, stream.held_out, stream.tasks)[0])
    assert all(union <= own for own, union in zip(result.own, result.union))
    assert len({*result.own, *result.union}) > 2  # the random model must not make this test trivial


def test_batch_size_does_not_matter(clip, tokenizer, stream):
    a, b = (evaluate(clip, tokenizer, stream, batch_size=n) for n in (1, 1000))
    assert (a.own, a.union, a.held_out) == (b.own, b.union, b.held_out)


def test_no_held_out_set(clip, tokenizer, make_task):
    assert evaluate(clip, tokenizer, TaskStream("one", [make_task("red", 2)])).held_out is None


def test_mode_and_gradients_are_left_alone(clip, tokenizer, stream):
    clip.train()
    evaluate(clip, tokenizer, stream)
    assert clip.training and all(parameter.grad is None for parameter in clip.parameters())
    clip.eval()
    evaluate(clip, tokenizer, stream)
    assert not clip.training


def test_embeddings_are_normalised_means_of_normalised_features(clip, tokenizer, make_task):
    task = make_task("red", 3, templates=3)
    with torch.no_grad():
        rows = class_embeddings(clip.eval(), tokenizer, task)
        parts = [
            clip.encode_text(tokenizer([form.format(c) for c in task.classes]), normalize=True)
            for form in task.templates
        ]
    torch.testing.assert_close(rows, F.normalize(torch.stack(parts).mean(0), dim=-1), rtol=0, atol=2e-6)


def test_a_shared_class_name_counts_only_for_its_own_data_set(clip, tokenizer):
    """Identical prompts give identical embeddings; the first one wins, the second task's copy scores 0 in the union."""
    images = InMemoryImages(torch.randn(6, 3, 16, 16), torch.zeros(6, dtype=torch.long))
    tasks = [Task(name, ("dog",), ("a {}",), images, images) for name in ("first", "second")]
    result = evaluate(clip, tokenizer, TaskStream("twins", tasks))
    assert result.own == (100.0, 100.0) and result.union == (100.0, 0.0)


def test_broken_weights_are_an_error_not_an_accuracy(clip, tokenizer, stream):
    with torch.no_grad():
        clip.visual.proj[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="image features of 'red' are not finite"):
        evaluate(clip, tokenizer, stream)
