import torch

from qwlit.optim.optimizers import set_clip_and_skip
from qwlit.training.loss_scale import GROWTH_STEPS, INITIAL, LARGEST, LossScale


def test_it_halves_on_overflow_down_to_one_and_doubles_after_many_good_steps() -> None:
    scale = LossScale()
    scale.update(overflow=True)
    assert (scale.factor, scale.explains_overflow) == (INITIAL / 2, True)
    for _ in range(GROWTH_STEPS - 1):
        scale.update(overflow=False)
    assert scale.factor == INITIAL / 2
    scale.update(overflow=False)
    assert scale.factor == INITIAL
    for _ in range(40):
        scale.update(overflow=True)
    assert (scale.factor, scale.explains_overflow) == (1.0, False)
    for _ in range(40 * GROWTH_STEPS):
        scale.update(overflow=False)
    assert scale.factor == LARGEST


def test_the_optimizer_divides_the_scale_out_and_clips_by_the_true_norm() -> None:
    for max_grad_norm in (None, 0.5, 100.0):
        weights = []
        for scale in (1.0, 2.0**14):
            weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
            optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True, eps=1e-2)
            for gradient in (torch.tensor([3.0, 0.1, -4.0]), torch.tensor([0.01, 0.02, 0.0])):
                weight.grad = gradient * scale
                set_clip_and_skip(optimizer, gradient.norm(), max_grad_norm, torch.tensor(0.0), scale)
                optimizer.step()
            weights.append(weight.detach().clone())
        assert torch.allclose(weights[0], weights[1], rtol=1e-6)
