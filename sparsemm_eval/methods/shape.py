"""The three numbers of a decoder that every allocation needs."""

from dataclasses import dataclass

from sparsemm_eval.errors import UserError


@dataclass(frozen=True)
class ModelShape:
    """Layers and heads of a decoder.

    Parameters
    ----------
    layers : int
        Decoder layers (L).
    query_heads : int
        Query heads a layer.
    kv_heads : int
        KV heads a layer (H). Query head ``q`` reads KV head ``q // group_size``.

    Raises
    ------
    ValueError
        If a count is not a positive integer or ``query_heads`` is no multiple of ``kv_heads``.
    """

    layers: int
    query_heads: int
    kv_heads: int

    def __post_init__(self) -> None:
        for name in ("layers", "query_heads", "kv_heads"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"{name}={value!r}: a ModelShape needs a positive integer here")
        if self.query_heads % self.kv_heads:
            raise UserError(
                f"query_heads={self.query_heads} is no multiple of kv_heads={self.kv_heads}: "
                "each KV head must serve the same number of query heads"
            )

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head (G)."""
        return self.query_heads // self.kv_heads
