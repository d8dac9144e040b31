"""Trains a small network with `FCRNLoss` to find rectangles in random images: seconds on a CPU.

python -m examples.minimal
"""

# README: from here
import torch
from torch import nn

from fcrn_fused import FCRNLoss, StepNegativeWeight

network = nn.Sequential(  # (B, 1, H, W) images -> (B, 7, H / 8, W / 8): 6 pose maps, 1 confidence
    nn.Conv2d(1, 32, kernel_size=8, stride=8), nn.ReLU(), nn.Conv2d(32, 7, kernel_size=3, padding=1)
)
optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
criterion = FCRNLoss(reduction="positive", return_stats=True)
schedule = StepNegativeWeight(criterion, step_size=2)  # negative cells: weight 0.01 at first


def training_step(images, target):
    loss, stats = criterion(network(images), target)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()  # raises that weight by 5 % every 2 steps, up to 1
    return loss, stats


# README: to here
def random_batch(size=16):
    """Images (size, 1, 64, 64) of one rectangle each, and targets (size, 7, 8, 8)."""
    images, target = 0.1 * torch.rand(size, 1, 64, 64), torch.zeros(size, 7, 8, 8)
    for image, maps in zip(images, target, strict=True):
        left, top = torch.randint(48, (2,)).tolist()
        width, height = torch.randint(4, 17, (2,)).tolist()
        image[0, top : top + height, left : left + width] = 1
        x, y = (left + width / 2) / 8, (top + height / 2) / 8  # the centre, in units of a cell
        column, row = int(x), int(y)
        pose = [x - column - 0.5, y - row - 0.5, width / 64, height / 64, 1.0, 0.0]  # angle 0
        maps[:, row, column] = torch.tensor([*pose, 1.0])
    return images, target


if __name__ == "__main__":
    for step in range(201):
        loss, stats = training_step(*random_batch())
        if step % 40 == 0:
            parts = [f"{name} {value.item():.2f}" for name, value in stats._asdict().items()]
            print(f"step {step}: loss {loss.item():.3f};", ", ".join(parts))
