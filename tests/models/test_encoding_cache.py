import dataclasses
import logging
import threading

import pytest
import torch

from vcd_fast.models.base import Condition
from vcd_fast.models.encoding_cache import EncodingItem, encode_all, encoding_key

SIZE = (4, 6, 9)


@dataclasses.dataclass(frozen=True)
class Encoding(Condition):
    value: torch.Tensor


class CountingEncoder:
    """Encodes a picture as its mean plus the length of its prompts."""

    condition_type = Encoding

    def __init__(self, fingerprint="one"):
        self.fingerprint = fingerprint
        self.batches = []
        self.barrier = None

    def encode(self, images, prompts, negative_prompts, height, width, num_frames, generator=None):
        assert images.shape[1:] == (3, height, width)
        if self.barrier is not None:
            self.barrier.wait()
        self.batches.append(list(prompts))
        lengths = torch.tensor([len(p) + 10 * len(n) for p, n in zip(prompts, negative_prompts, strict=True)])
        return Encoding((images.mean((1, 2, 3)) + lengths)[:, None])


def items(count):
    images = torch.rand(count, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    return [EncodingItem(image, "p" * i, "n") for i, image in enumerate(images)]


def expected(item):
    return item.image.mean() + len(item.prompt) + 10 * len(item.negative_prompt)


def check(conditions, wanted):
    assert len(conditions) == len(wanted)
    for condition, item in zip(conditions, wanted, strict=True):
        assert condition.value.shape == (1, 1)
        assert condition.value.item() == pytest.approx(expected(item).item())


def test_everything_is_encoded_once(tmp_path):
    encoder, progress = CountingEncoder(), []
    check(
        encode_all(encoder, items(5), tmp_path, *SIZE, batch_size=2, on_progress=lambda *a: progress.append(a)),
        items(5),
    )
    assert encoder.batches == [["", "p"], ["pp", "ppp"], ["pppp"]]
    assert progress == [(0, 5), (2, 5), (4, 5), (5, 5)]
    check(encode_all(encoder, items(5), tmp_path, *SIZE), items(5))
    assert len(encoder.batches) == 3


def test_an_encoder_is_not_asked_when_everything_is_there(tmp_path):
    encode_all(CountingEncoder(), items(3), tmp_path, *SIZE)

    class Untouchable:
        fingerprint, condition_type = "one", Encoding

    check(encode_all(Untouchable(), items(3), tmp_path, *SIZE), items(3))


def test_the_same_item_twice_is_encoded_once(tmp_path):
    encoder = CountingEncoder()
    twice = [items(2)[1], items(2)[0], items(2)[1]]
    check(encode_all(encoder, twice, tmp_path, *SIZE), twice)
    assert sum(map(len, encoder.batches)) == 2


def test_the_key_covers_everything_an_encoding_depends_on():
    item = items(2)[1]
    arguments = (item, *SIZE, "one")
    keys = {
        encoding_key(*arguments),
        encoding_key(item._replace(prompt="q"), *SIZE, "one"),
        encoding_key(item._replace(negative_prompt="m"), *SIZE, "one"),
        encoding_key(item._replace(prompt="pn", negative_prompt=""), *SIZE, "one"),
        encoding_key(item._replace(image=item.image + 1e-6), *SIZE, "one"),
        encoding_key(item._replace(image=item.image.transpose(1, 2)), *SIZE, "one"),
        encoding_key(item, 6, 4, 9, "one"),
        encoding_key(item, 4, 6, 13, "one"),
        encoding_key(item, *SIZE, "two"),
    }
    assert len(keys) == 9
    assert encoding_key(*arguments) == encoding_key(item._replace(image=item.image.clone()), *SIZE, "one")


def test_another_fingerprint_is_another_encoding(tmp_path):
    for fingerprint in ("one", "two"):
        encoder = CountingEncoder(fingerprint)
        encode_all(encoder, items(2), tmp_path, *SIZE)
        assert len(encoder.batches) == 1


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_a_damaged_entry_is_encoded_again_with_a_notice(tmp_path, caplog, damage):
    conditions = encode_all(CountingEncoder(), items(3), tmp_path, *SIZE)
    content = conditions.paths[1].read_bytes()
    conditions.paths[1].write_bytes({"cut": content[:-1], "garbage": b"x" * 64, "empty": b""}[damage])
    encoder = CountingEncoder()
    with caplog.at_level(logging.WARNING):
        check(encode_all(encoder, items(3), tmp_path, *SIZE), items(3))
    assert encoder.batches == [["p"]]
    assert f"{conditions.paths[1]} is damaged and will be encoded again" in caplog.text


def test_an_entry_that_breaks_later_is_named(tmp_path):
    conditions = encode_all(CountingEncoder(), items(1), tmp_path, *SIZE)
    conditions.paths[0].write_bytes(b"")
    with pytest.raises(OSError, match=r"this cached encoding cannot be read .*delete it and start again"):
        conditions[0]


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(self, path):
        path = str(path)
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Encoding, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        encode_all(CountingEncoder(), items(1), tmp_path, *SIZE)
    assert [path.name for path in tmp_path.iterdir()] == [".locks"]


def test_processes_that_want_the_same_share_the_work(tmp_path):
    """Threads stand in for processes: the locks are on open files, which they do not share."""
    encoders, results = [CountingEncoder(), CountingEncoder()], {}
    barrier = threading.Barrier(2, timeout=30)
    for encoder in encoders:
        encoder.barrier = barrier  # both are encoding at the same time, or the test fails

    def work(index):
        results[index] = encode_all(encoders[index], items(4), tmp_path, *SIZE, batch_size=2)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        check(results[index], items(4))
    done = [prompt for encoder in encoders for batch in encoder.batches for prompt in batch]
    assert sorted(done) == ["", "p", "pp", "ppp"]
