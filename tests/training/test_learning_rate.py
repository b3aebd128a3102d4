import pytest

from elsa_modifier.training.learning_rate import default_learning_rate

# arXiv 2510.01650, 90% sparsity, 4,096 steps: hidden size and learning rate.
PUBLISHED = {768: 2e-4, 2048: 1e-4, 3072: 1e-4, 4096: 1e-4, 5120: 5e-5}


@pytest.mark.parametrize("width", PUBLISHED)
def test_near_what_was_published(width):
    assert default_learning_rate(steps=4096, width=width, sparsity=0.9) == pytest.approx(PUBLISHED[width], rel=0.6)


def test_shorter_narrower_and_sparser_runs_get_more():
    rate = default_learning_rate(steps=1000, width=1024, sparsity=0.7)
    assert default_learning_rate(steps=125, width=1024, sparsity=0.7) == pytest.approx(2 * rate)
    assert default_learning_rate(steps=1000, width=256, sparsity=0.7) == pytest.approx(2 * rate)
    assert default_learning_rate(steps=1000, width=1024, sparsity=0.8) > rate
    assert default_learning_rate(steps=1000, width=1024, sparsity=0.3) == pytest.approx(
        default_learning_rate(steps=1000, width=1024, sparsity=0.5)
    )
