"""Options of `python -m pixart encode` about repeats, weights, masks, and variants of captions and pictures."""

import argparse
from pathlib import Path

from ..data.records import Dataset
from ..data.variety.captions import CaptionVariety
from ..data.variety.masks import MASKS, NONE
from ..data.variety.records import Variety, vary
from ..data.variety.views import CENTRE, FOCI, ViewVariety

_WORDS, _VIEWS = CaptionVariety(), ViewVariety()


def add_variety(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add = parser.add_argument_group("how often and how much pictures count").add_argument
    add(
        "--repeats", type=float, default=1.0, metavar="N", help="show each N times an epoch; 0.5: half of them by turns"
    )
    add("--loss-weight", type=float, default=1.0, metavar="W", help="factor of their loss")
    add("--named-repeats", action="store_true", help="folders such as 10_cat show their pictures 10 times, as kohya's")
    add("--masks", choices=MASKS, default=NONE, help="learn what is white in them: alpha channels, or files with "
        "-masklabel behind the picture's name")  # fmt: skip
    add("--mask-folder", type=Path, help="masks under the names of the pictures")
    add = parser.add_argument_group("several captions of each picture, of which a training draws one").add_argument
    add("--each-line", action="store_true", help="each line of a text, and entry of a list, is a caption of its own")
    add("--shuffle-tags", action="store_true", help="tags in another order in each variant")
    add("--drop-tags", type=float, default=0.0, metavar="SHARE", help="leave out so many tags in each variant")
    add("--keep-tags", type=int, default=0, metavar="N", help="the first N tags stay where they are")
    add("--tag-separator", default=_WORDS.separator, metavar="SIGN", help="default: %(default)s")
    add("--caption-variants", type=int, default=_WORDS.variants, metavar="K", help="where tags are shuffled or left "
        "out (default: %(default)s)")  # fmt: skip
    add("--trigger", default="", metavar="WORDS", help="at the beginning of all captions without them")
    add("--caption-prefix", default="", metavar="TEXT", help="before all captions")
    add("--caption-suffix", default="", metavar="TEXT", help="behind all captions")
    add = parser.add_argument_group("several views of each picture, of which a training draws one").add_argument
    add("--views", type=int, default=_VIEWS.variants, metavar="K", help="so many, the first as without (default: 1)")
    add("--focus", default=CENTRE, help=f"where pictures are cut: {', '.join(FOCI)}, or x,y from 0 to 1")
    add("--zoom", type=float, default=_VIEWS.zoom, metavar="TIMES", help="views at most so many times nearer")
    add("--flip-views", type=float, default=_VIEWS.flip, metavar="SHARE", help="share of views that is mirrored")
    add("--colour", type=float, default=_VIEWS.colour, metavar="STRENGTH", help="other colours in views, from 0 to 1")


def source_options(options: argparse.Namespace) -> dict:
    """What of them read_dataset takes."""
    return {"named_repeats": options.named_repeats, "masks": options.masks, "mask_folder": options.mask_folder}


def with_variety(dataset: Dataset, options: argparse.Namespace) -> Dataset:
    """The dataset as the options say. Raises ValueError for numbers out of range."""
    words = CaptionVariety(
        options.each_line,
        options.caption_variants,
        options.shuffle_tags,
        options.drop_tags,
        options.keep_tags,
        options.tag_separator,
        options.trigger,
        options.caption_prefix,
        options.caption_suffix,
    )
    views = ViewVariety(options.views, options.focus, options.zoom, options.flip_views, options.colour)
    variety = Variety(words if words.changes else None, views if views != _VIEWS else None, options.repeats,
                      options.loss_weight)  # fmt: skip
    return dataset if variety == Variety() else vary(dataset, variety)
