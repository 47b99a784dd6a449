"""What `fit` refuses with one line, rather than train something that cannot learn or end in a traceback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_store import tiny_store

from pretrain3d.__main__ import main

TINY = [
    "data.pool=train", "data.patch_size=[16,16,8]", "data.batch_size=2", "data.num_workers=0", "data.intensity=null",
    "+data.num_val_patches=2", "backbone={name: resenc, channels: [4, 8], blocks: [1, 1], strides: [1, 2]}",
    "module.warmup_steps=0", "trainer.max_steps=2", "trainer.val_every_n_steps=2", "trainer.checkpoint_every_n_steps=2",
    "trainer.accelerator=cpu", "trainer.precision=32-true",
]  # fmt: skip


@pytest.mark.parametrize(
    ("config", "overrides", "message"),
    [
        ("mae", ["trainer.max_steps=-1"], "trainer.max_steps=-1: module.schedule=cosine needs the length of the run"),
        ("mae", ["trainer.max_steps=0", "module.schedule=poly"], "trainer.max_steps=0: module.schedule=poly needs"),
        *(
            ("mae", [f"trainer.precision={name}"], f"precision={name}; it is one of 32-true, bf16-mixed, 16-mixed")
            for name in ("bf16-true", "16-true", "64-true", "64")
        ),
        ("swin_mix", ["data.flip_axes=[0,1,2]"], "data.flip_axes=[0, 1, 2] mirrors x and y, which together is half a"),
        ("swin_mix", ["data.batch_size=1"], "swin_mix tells the patches of a batch apart; data.batch_size is 1"),
        (
            "simclr",
            ["data.batch_size=1", "module.method.pairs=1", "module.method.crop_size=8"],
            "simclr tells the pairs of a batch apart; data.batch_size and pairs are 1",
        ),
    ],
)
def test_mistakes(config: str, overrides: list[str], message: str, tmp_path: Path, capsys: Any) -> None:
    tiny_store(tmp_path / "store")
    line = ["fit", "--config", f"configs/pretrain/{config}.yaml", "name=run", f"out={tmp_path}",
            f"data.store={tmp_path / 'store'}", *TINY, *overrides]  # fmt: skip
    assert main(line) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
