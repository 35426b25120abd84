"""The learning rate that is found: where a loss falls fastest."""

import pytest

import pixart_pack.pixart.training.watching.rates as rates_module
from pixart_pack.pixart.drawing.rates import draw_rates
from pixart_pack.pixart.training.watching.rates import Rates, find_rate, suggest
from pixart_pack.tests.training_data import make_features, tiny_model, tiny_settings


def test_the_steepest_fall_before_the_lowest_loss_is_suggested():
    losses = [1.0, 0.99, 0.9, 0.6, 0.5, 0.49, 0.6, 1.9]
    points = [(10.0**power, loss) for power, loss in zip(range(-7, 1), losses, strict=True)]
    assert suggest(points) == 1e-4
    assert suggest([(rate, 2 - loss) for rate, loss in points][:5]) is None and suggest(points[:2]) is None
    found = Rates(tuple(points), 1e-4)
    assert found.lines()[4] == " 1.00e-04   0.60000   -40.00 %  <- suggested" and len(found.lines()) == 9
    drawn = draw_rates(points, 1e-4)
    assert drawn.size == (768, 384) and (214, 96, 20) in {colour for _, colour in drawn.getcolors(1 << 16)}


@pytest.mark.slow
def test_a_rate_is_found_that_lowers_the_loss_and_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(rates_module, "COUNT", 7)
    monkeypatch.setattr(rates_module, "PICTURES", 2)
    told = []
    settings = tiny_settings(batch_size=2, caption_dropout=0.0, rank=4)
    found = find_rate(tiny_model(), make_features(4), settings, told=lambda done, of: told.append((done, of)))
    rates, losses = zip(*found.points, strict=True)
    assert found.suggested is not None and 1e-6 < found.suggested < 1e-1 and min(losses) < losses[0]
    assert list(rates) == sorted(rates) and told[-1] == (len(rates), 7) and not list(tmp_path.iterdir())
