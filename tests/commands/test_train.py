"""The command that trains, as far as it is not the training itself."""

import signal

from tqdm import tqdm

from pixart_pack.pixart.commands.train import _Bar


def test_signals_are_given_back_after_a_training():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with tqdm(disable=True) as bar, _Bar(bar) as events:
        assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == events._stop
        signal.raise_signal(signal.SIGTERM)
        assert events.should_stop()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
