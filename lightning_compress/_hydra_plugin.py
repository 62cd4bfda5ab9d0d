"""Adds the config group `compress` to every Hydra app of the environment.

Hydra imports this file at the start of each app that is installed beside this package, also of those that have
nothing to do with it: it imports neither torch nor the package, and does nothing but name a folder. It is installed
a second time as `hydra_plugins/lightning_compress.py`, where Hydra looks for plugins.
"""

from importlib.util import find_spec
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class LightningCompressSearchPathPlugin(SearchPathPlugin):
    """Appends the folder that holds `compress/*.yaml` to the app's config search path, behind the app's own."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        folder = _config_folder()
        if folder is not None:
            search_path.append(provider="lightning_compress", path=f"file://{folder.as_posix()}")


def _config_folder() -> Path | None:
    """The installed package's `conf`; where the sources are used in place, the `conf` beside the package."""
    spec = find_spec("lightning_compress")  # finds a package without importing it
    if spec is None or spec.origin is None:
        return None
    package = Path(spec.origin).parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "compress").is_dir():
            return folder
    return None
