"""The images of a task's documents, as lmms-eval shows them to a model."""

from __future__ import annotations

from collections.abc import Iterable

from lmms_eval.tasks import get_task_dict
from PIL import Image
from tenacity import RetryError

from sparsemm_eval.engine.evaluate import task_manager
from sparsemm_eval.errors import UserError, one_line


def visuals(task: str, doc_ids: Iterable[int]) -> dict[int, list[Image.Image]]:
    """Load images of documents.

    The data is loaded as for a run: from the cache where it is there, else from the hub where
    there is one.

    Parameters
    ----------
    task : str
        Known to lmms-eval, or in `tasks/`.
    doc_ids : iterable of int
        Numbers of documents, as samples files have them.

    Returns
    -------
    dict
        Images by number of document; what is no image (a video, a sound) is left out.

    Raises
    ------
    ValueError
        For an unknown task, one whose data cannot be loaded, or a document it does not have.
    """
    try:
        loaded = get_task_dict([task], task_manager([task]))[task]
    except RetryError as error:
        cause = error.last_attempt.exception()
        raise UserError(f"its data cannot be loaded ({one_line(cause)})") from error
    documents = loaded.eval_docs
    images = {}
    for doc_id in doc_ids:
        if not 0 <= doc_id < len(documents):
            raise UserError(
                f"{task} has {len(documents)} documents, and none is number {doc_id}: its data is "
                "not that of the run"
            )
        shown = loaded.doc_to_visual(documents[doc_id]) or []
        images[doc_id] = [image for image in shown if isinstance(image, Image.Image)]
    return images
