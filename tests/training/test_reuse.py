"""Problems met several times: in what order, answered how often, and back to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
import torch
from torch import Tensor

from ldcp_core import SoftGate
from ldcp_core.diffusers import topology_of
from training.data.encoding import Batch
from training.data.images import Position
from training.model.encode import embed_prompts
from training.model.load import DiffusionModel
from training.step.denoising import Answered, Denoising
from training.step.reuse import Problems

WINDOW, TIMES = 3, 2


class Drawn:
    """Problems of images of smooth noise, and everything a fit would hold beside them."""

    def __init__(self, model: DiffusionModel, times: int = TIMES) -> None:
        self.denoising, self.position = Denoising(model, 0), Position()
        self.answers, self._context = 0, embed_prompts(model, [""])[0]
        self.sites = [site.name for site in topology_of(model.unet).sites("mid")]
        self.problems = Problems(
            self.denoising, self._stream(), self.position, self.sites, WINDOW, times
        )
        answered = self.denoising.answered

        def counted(*arguments: object) -> Answered:
            self.answers += 1
            return answered(*arguments)  # type: ignore[arg-type]

        self.denoising.answered = counted  # type: ignore[method-assign]

    def _stream(self) -> Iterator[Batch]:
        while True:
            generator = torch.Generator().manual_seed(self.position.offset)
            self.position.offset += 1
            name = str(self.position.offset)
            latents = torch.randn(1, 4, 16, 16, generator=generator)
            yield Batch(latents, self._context, [name], 1, slice(1))


def all_of(answered: Answered) -> list[Tensor]:
    problem = answered.problem
    shared = [answered.shared["conv_in"], *answered.shared["down_blocks.3"][1]]
    return [problem.noisy, problem.noise, problem.timesteps, answered.dense, *shared]


def equal(a: Answered, b: Answered) -> bool:
    return all(torch.equal(x, y) for x, y in zip(all_of(a), all_of(b), strict=True))


def test_a_window_comes_several_times_and_is_answered_once(model: DiffusionModel) -> None:
    drawn = Drawn(model)
    drawn.problems.begin()
    met = [next(drawn.problems) for _ in range(2 * WINDOW * TIMES)]
    assert drawn.answers == drawn.position.offset == 2 * WINDOW
    numbers = [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]  # windows of three, each of them twice
    for (i, a), (j, b) in product(enumerate(met), repeat=2):
        assert equal(a, b) == (numbers[i] == numbers[j])


def test_without_reuse_every_problem_is_new(model: DiffusionModel) -> None:
    drawn = Drawn(model, times=1)
    drawn.problems.begin()
    met = [next(drawn.problems) for _ in range(4)]
    assert drawn.answers == 4 and not any(equal(met[0], other) for other in met[1:])
    assert not drawn.problems._held


def test_gates_meet_in_a_reused_problem_what_they_meet_in_a_new_one(model: DiffusionModel) -> None:
    drawn = Drawn(model)
    drawn.problems.begin()
    widths = {site.name: site.channels for site in topology_of(model.unet).sites("mid")}
    gates = {
        site: SoftGate(torch.arange(width) % 2 * 1.0, torch.zeros(width))
        for site, width in widths.items()
    }
    for _ in range(WINDOW * TIMES):
        answered = next(drawn.problems)
        with drawn.denoising.pruned(answered, gates, "zero") as output:
            pass
        plain = drawn.denoising.gated(answered.problem, gates, "zero")
        torch.testing.assert_close(output, plain, rtol=1e-5, atol=1e-6)
        dense = drawn.denoising.dense(answered.problem)
        torch.testing.assert_close(answered.dense, dense, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("met", range(WINDOW * TIMES + 2))
def test_a_state_goes_on_with_the_same_bits(model: DiffusionModel, met: int) -> None:
    whole = Drawn(model)
    whole.problems.begin()
    for _ in range(met):
        next(whole.problems)
    state = whole.problems.state_dict()
    again = Drawn(model)
    again.problems.load_state_dict(state)
    for _ in range(WINDOW * TIMES):
        assert equal(next(whole.problems), next(again.problems))
    assert again.position == whole.position
