"""Methods from outside the package: a file of the user's, a module, or an installed package."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from sparsemm_eval.errors import UserError, one_line

GROUP = "sparsemm_eval.methods"
_OURS = __name__.partition(".")[0]


@dataclass(frozen=True)
class Plugin:
    """Code that was imported because it registers methods.

    Parameters
    ----------
    name : str
        What another process loads it by: a file's absolute path, or a module's name.
    digest : str
        SHA-256 of its source, see `source_digest`.
    """

    name: str
    digest: str


def load_plugin(name: str) -> Plugin:
    """Import a plugin, once; what it registers is then known everywhere in this process.

    Parameters
    ----------
    name : str
        A Python file (anything that ends in ``.py``), or a module that can be imported.

    Raises
    ------
    UserError
        If there is no such file or module, it fails while it is imported, or registers nothing.
    """
    path, before = Path(name), len(_registered)
    if path.suffix == ".py":
        if not path.is_file():
            raise UserError(f"plugin={name}: there is no such file")
        name = str(path.resolve())
        known = _imported_from(name)
        module = known or _import_file(Path(name))
    else:
        known = name if name in sys.modules else None
        module = _import(name, f"plugin={name}")
    if known is None and len(_registered) == before:
        del sys.modules[module]  # asked again, it is refused again
        raise UserError(
            f"plugin={name}: it registers neither a method nor a family; let it call "
            "register_method or register_family"
        )
    return Plugin(name, source_digest(module) or "")


def note_registered(name: str) -> None:
    """Note that a method or a family was registered, by whatever is being imported."""
    _registered.append(name)


_registered: list[str] = []


def load_installed() -> None:
    """Import what installed packages name in the entry point group ``sparsemm_eval.methods``.

    Raises
    ------
    UserError
        If one fails while it is imported.
    """
    if _done:
        return
    _done.append(True)
    try:
        for point in entry_points(group=GROUP):
            package = point.dist.name if point.dist else point.value
            _import(point.module, f"the installed package {package} (entry point {point.name})")
    except UserError:
        _done.clear()  # asked again, it fails again
        raise


_done: list[bool] = []


def source_digest(module: str) -> str | None:
    """SHA-256 of the source that a module of another package comes from.

    Parameters
    ----------
    module : str
        Name of an imported module.

    Returns
    -------
    str or None
        Of every ``.py`` file of its top-level package, or of its file where it is none; None
        where the source is in no file, as in a notebook.
    """
    top = sys.modules[module.partition(".")[0]]
    folders = [Path(folder) for folder in getattr(top, "__path__", ())]
    files = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    if not folders:
        file = getattr(top, "__file__", None)
        if file is None or not Path(file).is_file():
            return None
        files = [Path(file)]
    digest = hashlib.sha256()
    for path in files:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def is_ours(module: str) -> bool:
    """Whether a module is part of this package."""
    return module.partition(".")[0] == _OURS


def _imported_from(path: str) -> str | None:
    """Name of the module that a file was imported as already."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str) and file == path:
            return name
    return None


def _import_file(path: Path) -> str:
    # Two files of one name must not be taken for each other.
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"plugin={path}: Python cannot import it")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # a dataclass is looked for where it says it is from
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _broken(f"plugin={path}", error) from error
    return name


def _import(module: str, whose: str) -> str:
    try:
        importlib.import_module(module)
    except Exception as error:
        raise _broken(whose, error) from error
    return module


def _broken(whose: str, error: Exception) -> UserError:
    words = one_line(error)
    if not isinstance(error, UserError):
        words = f"{type(error).__name__}: {words}"
    return UserError(f"{whose} cannot be imported ({words})")
