"""Image files that a row names by a path: which of them may be read.

A data file is not trusted with the whole machine. A path leads to a file inside the folders that the user named (the
data file's, `media_dir`, the working directory), after symbolic links are followed, or it leads nowhere; a path in a
dataset from a Hub always leads nowhere.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

HUB_REASON = (
    "the image is given as a path ({!r}), and no path of a dataset from a Hub is followed; download the dataset and "
    "register it as a local file"
)


def folders_of(dataset_attr, data_args) -> list[str]:
    """The real folders in which the paths of a registered dataset are looked up, in order; [] if none is followed.

    dataset_attr, data_args: LLaMA-Factory's, of a dataset_info.json entry and of the recipe.
    """
    registry = str(data_args.dataset_dir)
    place = os.path.join(registry, dataset_attr.dataset_name)
    is_local = dataset_attr.load_from == "file" or (dataset_attr.load_from == "script" and os.path.isdir(place))
    if not is_local or registry.startswith("REMOTE:"):
        return []
    own = place if os.path.isdir(place) else os.path.dirname(place)
    folders = [os.path.realpath(folder) for folder in (data_args.media_dir or registry, own, ".")]
    return list(dict.fromkeys(folders))


def find_file(path: str, folders: Sequence[str]) -> str:
    """The real path of the image file that a row calls `path`; relative paths are tried in every folder, in order.

    Raises:
        OSError: there is no such file, it is outside of `folders`, or `folders` is empty (a dataset from a Hub). The
            message says which and what to do.
    """
    if not folders:
        raise OSError(HUB_REASON.format(path))
    strange = []
    for folder in folders:
        try:
            place = os.path.realpath(os.path.join(folder, path))
        except ValueError as error:  # a NUL or half a character
            raise OSError(f"image file {path!r} cannot exist ({error})") from error
        if not is_inside(place, folders):
            strange.append(place)
        elif os.path.isfile(place):
            return place
    if strange:
        raise OSError(outside(path, strange, folders))
    raise OSError(f"image file {path!r} not found in {', '.join(folders)}")


def states(paths: Sequence[str], folders: Sequence[str]) -> list[tuple[int, int, int] | None]:
    """(inode, size, time of the last change) of each path's file in the first folder that has it; None: no folder."""
    found = []
    for path in paths:
        state = None
        for folder in folders:
            try:
                file = os.stat(os.path.join(folder, path))
            except (OSError, ValueError):
                continue
            state = (file.st_ino, file.st_size, file.st_mtime_ns)
            break
        found.append(state)
    return found


def is_inside(place: str, folders: Sequence[str]) -> bool:
    """Whether a real path is one of the real folders, or below one."""
    return any(os.path.join(place, "").startswith(os.path.join(folder, "")) for folder in folders)


def outside(path: str, places: Sequence[str], folders: Sequence[str]) -> str:
    """The sentence that refuses a path which leads to one of `places`, with the key that would allow it."""
    meant = next((place for place in places if os.path.isfile(place)), places[0])
    return (
        f"image file {path!r} is outside the folders that images are read from ({', '.join(folders)}); "
        f"set `media_dir: {os.path.dirname(meant)}` if it is meant"
    )
