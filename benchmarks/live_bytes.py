"""Count the bytes of all tensors that are alive, also of fake ones."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Follows every storage that an operator returns, until it is freed or FSDP2 resizes it."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._sizes: dict[int, int] = {}

    def __enter__(self) -> "LiveBytes":
        self._resize = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> None:
            self._resize(storage, size)
            self._set(storage._cdata, size)

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign,assignment]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and not tensor.is_sparse:
                self._follow(getattr(tensor, "_local_tensor", tensor).untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._set(key, storage.nbytes())
            weakref.finalize(storage, self._set, key, 0)

    def _set(self, key: int, size: int) -> None:
        self.now += size - self._sizes.pop(key, 0)
        if size:
            self._sizes[key] = size
        self.most = max(self.most, self.now)
