import pytest

from elsa_modifier.training.learning_rate import default_learning_rate

# arXiv 2510.01650, 80% sparsity, 4,096 steps: hidden size and learning rate.
PUBLISHED = {768: 2e-4, 2048: 1e-4, 3072: 1e-4, 4096: 5e-5, 5120: 5e-5}


@pytest.mark.parametrize("width", PUBLISHED)
def test_near_what_was_published(width):
    ratio = default_learning_rate(steps=4096, width=width, sparsity=0.8) / PUBLISHED[width]
    assert 0.5 < ratio < 2.5


def test_shorter_narrower_and_sparser_runs_get_more():
    rate = default_learning_rate(steps=300, width=1024, sparsity=0.7)
    assert default_learning_rate(steps=30, width=1024, sparsity=0.7) == pytest.approx(10 ** (1 / 4) * rate)
    assert default_learning_rate(steps=76_800, width=1024, sparsity=0.7) == pytest.approx(rate / 2)
    assert default_learning_rate(steps=300, width=512, sparsity=0.7) == pytest.approx(2 * rate)
    assert default_learning_rate(steps=300, width=1024, sparsity=0.8) > rate
    assert default_learning_rate(steps=300, width=1024, sparsity=0.3) == pytest.approx(
        default_learning_rate(steps=300, width=1024, sparsity=0.5)
    )


def test_its_scale():
    assert default_learning_rate(steps=64, width=1000, sparsity=0.8) == pytest.approx(7.5e-4)
    assert default_learning_rate(steps=64, width=1000, sparsity=0.8 + 1e-9) == pytest.approx(7.5e-4)
    assert default_learning_rate(steps=64, width=1000, sparsity=0.9) == pytest.approx(7.5e-4 * 2 ** (1 / 3))
    assert default_learning_rate(steps=64, width=1000, sparsity=0.95) == pytest.approx(7.5e-4 * 4 ** (1 / 3))
    assert default_learning_rate(steps=64, width=1000, sparsity=0.999) == pytest.approx(1.5e-3)
    assert default_learning_rate(steps=64, width=1000, sparsity=0.5) == pytest.approx(3e-4)
