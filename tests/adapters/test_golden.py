"""Adapter folders of every release so far: they load to the last bit, and today's writer gives the same tensors.

The folders under `tests/golden` are never rewritten: a release that changes the format adds folders of its own and
reads the old ones. Their numbers come from arithmetic alone, so they are the same on every machine.

Releases up to 0.5 wrote format 1 of `lorary.json`, with other names for components and for the fields of a site. Of
those folders, the tensors and PEFT's files are still written byte for byte, and `lorary.json` up to the new names; only
DoRA's magnitudes have a name in them that Transformers' `load_adapter` passes over. The folders of 0.6.0 pin the bytes
of format 2, one for each structurally different kind.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import lorary
from lorary import AdaptedSite, Adapter, Fingerprint, Site, _deprecated
from lorary.adapters.peft.reader import WEIGHTS
from lorary.adapters.shared_tensors import leading_slices
from lorary.files.tensor_file import write_tensors
from lorary.methods.adalora import SVDDelta
from lorary.methods.longlora import LongContext
from lorary.methods.o_lora import SequentialLoRA
from lorary.spec.placement import shared_shapes
from lorary.spec.site import Part

GOLDEN = Path(__file__).parent.parent / "golden"
FILES = {
    "alora-0.6.0/adapter_config.json": "578728efc0521e1f864971daf3abf9bff8fbc7f6cde25f7afae98f6782030580",
    "alora-0.6.0/adapter_model.safetensors": "7dbccd81640be9a5d0be0db98542aa3f1bdca794b8af76ead0da7d96205a2070",
    "alora-0.6.0/lorary.json": "a7c5b53b20a2f1ca4d701bf10cdcb47ccf05203ab3b2353d236b7587db57f3e8",
    "lora-bias-0.6.0/adapter_config.json": "2d1b74120e4501f8593e057a87a261b5e488c9c898515def15cf297654c050c8",
    "lora-bias-0.6.0/adapter_model.safetensors": "94f67aa60101c73c42ab8bba4e72de031d4745ec61c204ce65f1a5984ce30dc2",
    "lora-bias-0.6.0/lorary.json": "c3cb00436e7be70a5210b33d8ee0b81e996c8bc860479c42cf6e922672a83a35",
    "hira-0.6.0/adapter_config.json": "0bb27603838d8d82f8356482edff395c2ec0a16601d95c828af44d6a70b91864",
    "hira-0.6.0/adapter_model.safetensors": "9b95051dbd824fdc9ad290ab40949e6a117e52b2550ee68d7cf43d24d486b0ca",
    "hira-0.6.0/lorary.json": "188f33b16f334dbe25677bd6dbf11665ce90c7ead68d83efd9be06963041afd2",
    "miss-0.6.0/adapter_config.json": "5fc35345a2ffa61b4e0364fa9449eedbec311651a5e7876a9390af04feaae220",
    "miss-0.6.0/adapter_model.safetensors": "cfdc87a8b08f0a3a59a3d6adb49472e4675154b74843cd02cd276fd0e6d98842",
    "miss-0.6.0/lorary.json": "af35df5e393477f7f082951beee2e07971e1ab63f68c33840fc5a3c5ace6d7fb",
    "miss-own-0.6.0/adapter.safetensors": "4b1eae5ecac6b2208d2d5a9cc02c25f0a1b96c4dd7c2f5ff2b21b8bda0df859d",
    "miss-own-0.6.0/lorary.json": "f7633f1d801ec3c65580a28e2bb2cdec7f4b5b4c664347027f7ee24b9262f515",
    "loha-0.6.0/adapter_config.json": "8130986ba236b43812c82a65561a20a29f2da3009e2d50dea3108bf9643957f0",
    "loha-0.6.0/adapter_model.safetensors": "e1668cad4716cc4ff48d9c463c7a9ddc907a9622e384df654e8c41308340dbb3",
    "loha-0.6.0/lorary.json": "89fb3689fd0f19c01e15f95fc6e988267c1aed65dc4d2f88f33d176f07d797c6",
    "lokr-0.6.0/adapter_config.json": "1afb2abfd1f1546f4757cddaf53005403a620b3e0a5291151cfb60c9929c117d",
    "lokr-0.6.0/adapter_model.safetensors": "7d49010a3dc0cf4191dc4759e4f35ef80f41e5357b35fe929ce7cb408267bf52",
    "lokr-0.6.0/lorary.json": "1acbc08b343b8db8faf05b6fea2d7e7a52d833a66e968db886458761bb2daaf0",
    "loftq-0.6.0/adapter.safetensors": "888a02a77140a91391216be821dc3b864b069bfa06f2f6cbc6ce1ea8876cb58c",
    "loftq-0.6.0/lorary.json": "12cc538889d4d561ff905e85a611ba3007715bd134ed611462992b0fa24f9e3a",
    "lora-ga-0.6.0/adapter.safetensors": "888a02a77140a91391216be821dc3b864b069bfa06f2f6cbc6ce1ea8876cb58c",
    "lora-ga-0.6.0/lorary.json": "8b6b02f563fe2dfc06391dd5c04befbfaa808ddfe63798ac6c3b57cdd4ddc626",
    "corda-0.6.0/adapter.safetensors": "888a02a77140a91391216be821dc3b864b069bfa06f2f6cbc6ce1ea8876cb58c",
    "corda-0.6.0/lorary.json": "bba7a5cd9ab87a40fba1e76d8d99a2d916ee01a1cd80cb19a7a86d9ff18afac5",
    "eva-0.6.0/adapter_config.json": "e01ad3e01ed53747ecae859f86b1ad945334f016b8b6a500437d38ec3b497a1e",
    "eva-0.6.0/adapter_model.safetensors": "48b64dd9f3b19c11020bbf8c278c1efa1e9feef5934809547faebf053af5488c",
    "eva-0.6.0/lorary.json": "d6704e37d1568e79c6d7eb3e260815c034822a53b7d662ec29a1c9a5d3181124",
    "houlsby-0.6.0/adapter.safetensors": "04188e5db7b8d21cd8cfc9e67d72f64f4326710128116bd0205ad5b00c6c67a6",
    "houlsby-0.6.0/lorary.json": "1a56ba3985b174bc98ca34c8c22e52da509fd7b615c1788899d3ebd958b2605a",
    "ia3-0.6.0/adapter_config.json": "4999394e719ef22b2a31de3d867fe6017c426c2ac869efbbbce9e30733c9d179",
    "ia3-0.6.0/adapter_model.safetensors": "6e5052b6ae147a51b4d0abfcac6f4179b779abb2a585f1a65dca1af6990339d3",
    "ia3-0.6.0/lorary.json": "eb05e6684dfffa6f2b9811dab9918f6e992f4a9a0c202dda5461e1f27c0ef192",
    "rows-0.6.0/adapter_config.json": "7832f88b30d1dbae1b020d8f94299cb787d934a83fa654e996042088af71fd2c",
    "rows-0.6.0/adapter_model.safetensors": "16ee06f6159e7fec27994ceb0d1d75288c99f8ad5b4c66988bb086b9354a119e",
    "rows-0.6.0/lorary.json": "d3a9b5cdd1c8b95769c2a9e54df447dacdaa685a9677f50e1ff92c323f408de4",
    "prefix-tuning-0.6.0/adapter_config.json": "6bfe559f62dc19270d9dd1ec7ad1053a23c8006ac1eb5d120d146e9407e9f05d",
    "prefix-tuning-0.6.0/adapter_model.safetensors": "7a6d6684dc34f5956885bfd39e7de86d0f21e8da78cb7b766f9f97029e5aa8ca",
    "prefix-tuning-0.6.0/lorary.json": "bf74f0020123c5de0c7d94c717aa08d8a10f7afd52a57163da5d8ac8f7506a3d",
    "prefix-network-0.6.0/adapter.safetensors": "0ae07a5a30a1de9bdf361380888d131119f1a026e40b45f4692dc5633218421b",
    "prefix-network-0.6.0/lorary.json": "33ef940b098050a390a971fc2a8551130adc87201f8718cec51cb23e704afc09",
    "prompt-tuning-0.6.0/adapter_config.json": "1ac81a463e6e722beca94c10327e6bde236ed156b0001b245f962316696b3607",
    "prompt-tuning-0.6.0/adapter_model.safetensors": "a7fbc234f5e3a7a76d3e648dd871a3b9609762e8367b5e4ef4e512941e905b2e",
    "prompt-tuning-0.6.0/lorary.json": "86531a0d6a845fb5e59d8dd52dc7bd9ea50ea094e126d3a030cbc682ae018e15",
    "adalora-0.5.0/adapter_config.json": "c967ba1b3d795b4b8f4f55a999c422217aa8978ecd913ee242b02eb6c9e2230d",
    "adalora-0.5.0/adapter_model.safetensors": "28e8d0b4270c14d19c3380b20e379bede43d18478677b9a454685adad7cd494b",
    "adalora-0.5.0/lorary.json": "1cd741e68ad10595825869a6c5cb324124b7ead0bbe3de25c2978d11e4e73bd7",
    "bitfit-0.5.0/adapter.safetensors": "589d5e5def233bf5ab0815eda378b935a01504a73e9da88437b20f76d3ccc16b",
    "bitfit-0.5.0/lorary.json": "b179272a3d9605532cbf8b4efbe046d6874b6a133509a762914be40cb01c476e",
    "delta-lora-0.5.0/adapter.safetensors": "c71c920f4b51aef8f3cd9fb13b3b4314c0ecec380c5ea576de5ecf96af45c3c4",
    "delta-lora-0.5.0/lorary.json": "f978ce7ce3f5deebf3dc72e6d69acee8e2605c11c944106e1a8db9fbaa9422a0",
    "dora-0.5.0/adapter_config.json": "468c2dbd47af81db40edc30289c2b7218165bf1833befad4fe972fa64f25f8f7",
    "dora-0.5.0/adapter_model.safetensors": "6ab0338453dd71a1b07089f1296f3cf60adce973a6876108b2ec5f81557f2484",
    "dora-0.5.0/lorary.json": "5aac47934da76638437bc61fac2ef1c55b16dd8bdcec748788c7afbc0ab8d1cb",
    "full-0.5.0/adapter.safetensors": "589d5e5def233bf5ab0815eda378b935a01504a73e9da88437b20f76d3ccc16b",
    "full-0.5.0/lorary.json": "8301db878fee3da7eeae54adf6a672d440e5342b389fa1bc10331bc4b599745d",
    "glora-0.5.0/adapter.safetensors": "c2f6439a1a4d3f3c70626eefebaba62751312a14c62ddeb2d5705b722abc284e",
    "glora-0.5.0/lorary.json": "fc1e65c015e7eff71531a6b67d17f821c58802f53ede61382b25ec0700314978",
    "lora-0.5.0/adapter_config.json": "e01ad3e01ed53747ecae859f86b1ad945334f016b8b6a500437d38ec3b497a1e",
    "lora-0.5.0/adapter_model.safetensors": "48b64dd9f3b19c11020bbf8c278c1efa1e9feef5934809547faebf053af5488c",
    "lora-0.5.0/lorary.json": "e0e10b79497cbcfdcc01355dc9ba12c4a53a8d441f6430064e8aa0fb2280132f",
    "lora-fa-0.5.0/adapter_config.json": "e01ad3e01ed53747ecae859f86b1ad945334f016b8b6a500437d38ec3b497a1e",
    "lora-fa-0.5.0/adapter_model.safetensors": "48b64dd9f3b19c11020bbf8c278c1efa1e9feef5934809547faebf053af5488c",
    "lora-fa-0.5.0/lorary.json": "191b277754578fc740fe12e84fca0af5a5d8f6af1811cec1fadb60b0dec54a1b",
    "lora-plus-0.5.0/adapter_config.json": "e01ad3e01ed53747ecae859f86b1ad945334f016b8b6a500437d38ec3b497a1e",
    "lora-plus-0.5.0/adapter_model.safetensors": "48b64dd9f3b19c11020bbf8c278c1efa1e9feef5934809547faebf053af5488c",
    "lora-plus-0.5.0/lorary.json": "2aac5596ce315d386c4e4da69c4deafad2723a7aa0fbda1027bda90fd7b1e5e9",
    "melora-0.5.0/adapter.safetensors": "51d2d3249878493fca25ca09e19b710d26cbec212dccc2be48fa48a56f2f0789",
    "melora-0.5.0/lorary.json": "6c3decb826af6aa95f5efdca4aa3908e32c37626f705cc0ff3762dc8357005eb",
    "multilora-0.5.0/adapter.safetensors": "3e1982ebade3686ddba1f6f8d6aa513ddd100461a7c40e46d00f9685b64fe7f0",
    "multilora-0.5.0/lorary.json": "5eac73f586de9f3e00577fb10d5612f76bcc7e27414b5620ea4634f1701b6de2",
    "o-lora-0.5.0/adapter_config.json": "e01ad3e01ed53747ecae859f86b1ad945334f016b8b6a500437d38ec3b497a1e",
    "o-lora-0.5.0/adapter_model.safetensors": "48b64dd9f3b19c11020bbf8c278c1efa1e9feef5934809547faebf053af5488c",
    "o-lora-0.5.0/lorary.json": "1009db6fc161fc8beb7d53258eb018b56868c6a380f087d004067e808ff13477",
    "olora-0.5.0/adapter.safetensors": "888a02a77140a91391216be821dc3b864b069bfa06f2f6cbc6ce1ea8876cb58c",
    "olora-0.5.0/lorary.json": "88b6cf13acc7c002f879291044bafa11067edcfd84fb728fe1a07fb10f9f2dda",
    "pissa-0.5.0/adapter.safetensors": "888a02a77140a91391216be821dc3b864b069bfa06f2f6cbc6ce1ea8876cb58c",
    "pissa-0.5.0/lorary.json": "5aad1f3f075d04a6d865ae9dfa3cc683361357967f1036d8cb4529b2f401b6b8",
    "qlora-0.5.0/adapter_config.json": "e01ad3e01ed53747ecae859f86b1ad945334f016b8b6a500437d38ec3b497a1e",
    "qlora-0.5.0/adapter_model.safetensors": "48b64dd9f3b19c11020bbf8c278c1efa1e9feef5934809547faebf053af5488c",
    "qlora-0.5.0/lorary.json": "789e330852c33aaac9d5ee6a4ea7e5cb2b2c346b49eeff0d52f83a7c9967ceb7",
    "rslora-0.5.0/adapter_config.json": "1a58009298447342bb60907326ae732f36ea74517f3b942ae5e59072af7a0aa4",
    "rslora-0.5.0/adapter_model.safetensors": "48b64dd9f3b19c11020bbf8c278c1efa1e9feef5934809547faebf053af5488c",
    "rslora-0.5.0/lorary.json": "3fd651d92e9a17984292b598f33f706160cccdca38c480299c33ebc88d37be8e",
    "vera-0.5.0/adapter_config.json": "6686f16fbad2a6decaf5638307d0035acc6fbf6252da055ac7e9f6879dfe67f6",
    "vera-0.5.0/adapter_model.safetensors": "e08f3dbc6737f97e8ef12b5456b64b8793633d76600b54f78c26295cb5b9f5f5",
    "vera-0.5.0/lorary.json": "fd64d8f831085a26dbfb0ad9f6d5496e8e4744398832b5ad236d7d20746d3504",
    "lora-0.1.0/adapter_config.json": "851023a13e7b57d963ec182e33e731b592a778da852bde453286b080a5794427",
    "lora-0.1.0/adapter_model.safetensors": "5628e1335a848212dc0965faf637cad1a631b2d9d5c0da6c531569f75fde66a1",
    "lora-0.1.0/lorary.json": "eb129f67d5c9ea58c68be35ad0f93987af619e8f1e8fbb3e13702643b19d7d5c",
    "grouped-0.1.0/adapter.safetensors": "d6a91fc931fc5f19e49770779e83fa644cb1fdad83a290f6ac2f443e56aa49b6",
    "grouped-0.1.0/lorary.json": "fc0d9c43744d7a53b4d56c4227a250e5e7f752e5eda5e8a8f038e12206cbbb67",
    "dora-0.6.0/adapter_config.json": "6c9f6b69d9261101d2fd211f600e1e193a003b6e0a9ec5864f502b44ee06af6d",
    "dora-0.6.0/adapter_model.safetensors": "78f5996188cfd61608749fd966be646c967b0f7e9b396232b1e6fc4dcad0231a",
    "dora-0.6.0/lorary.json": "9717e9c8808ca9aa71ac23499bdae49d20aa7c3bce50797305aa5e5d2656a1a8",
    "dora-0.2.0/adapter_config.json": "6c9f6b69d9261101d2fd211f600e1e193a003b6e0a9ec5864f502b44ee06af6d",
    "dora-0.2.0/adapter_model.safetensors": "87862a68a92035ad1f88ff02b30b3663af0d7f423e61678512974bf44ff0fe2f",
    "dora-0.2.0/lorary.json": "1dcd177ed25968df9b554e4fa5fd2c3498cfb923057caf3f246a43fc4ef4a6a9",
    "pissa-0.2.0/adapter.safetensors": "54ddccef7a7afcc2836b30c90e467e03fc0989fb13a4272c4ef3430748b1b521",
    "pissa-0.2.0/lorary.json": "01c1bc8ac1115170ae5adf3885553befa557a26e42bd88c72c8f8938c47430e8",
    "several-0.2.0/adapter.safetensors": "5efd153ba4bd31414337da5ac93b07d241ab171e1018d5b2f8735aaabd62d81f",
    "several-0.2.0/lorary.json": "9d3dbd0f2827a4fb99c2e0227a6df7d7566c73029200591c65f9e67153e5303b",
    "vera-0.2.0/adapter_config.json": "36b380be468a0d035bed2779c0a0c33d8dead456d45d91ebb577aba62a4005c1",
    "vera-0.2.0/adapter_model.safetensors": "79a5effdcf130b7335889d551722610830b913e20c6df0e2ba8a901eac7e213a",
    "vera-0.2.0/lorary.json": "8f4d2db780caae32122851f00de8b2600cb546027241c75e901dd913d57cfeae",
    "vera-drawn-0.2.0/adapter.safetensors": "406136568c5be88054b84a65a144b5a3d62b9305bbf4a7264bced0601421b3dd",
    "vera-drawn-0.2.0/lorary.json": "7e67a88e4a2dcba3bc2966b6f0db4e29c7908b444d5a89b26193830b82791feb",
    "glora-0.2.0/adapter.safetensors": "44592a4db0b57f97a4ba3d1fc48a143809dc36a894fa2eb5ae044d3c324d1a4c",
    "glora-0.2.0/lorary.json": "d49d17e5aa5a547f1fa547b8a9fd928fdfcd456a7ee8d3840ed8f828d032bda8",
    "adalora-0.3.0/adapter_config.json": "5b8ecdf9d1ae2fedde6fcb5f33426bb542d346dfcc4a1e6e0ff5be48341ece72",
    "adalora-0.3.0/adapter_model.safetensors": "8203f2e97a4a15bd5b676340b7ec255b60116ac3f93be5c03e5c55e5a9e69554",
    "adalora-0.3.0/lorary.json": "97c7669d8b164f18cb1c4c45c1e50234bffe4a030fe83d8df77a3275bdf3e948",
    "o-lora-0.3.0/adapter_config.json": "ecb3f08bbeed00919eb7202746d2761c23ca02d9b251ebc969557fded3f9b320",
    "o-lora-0.3.0/adapter_model.safetensors": "cf591a6f9368539842c95e33dfcc17ab02a548781b9c3edb002258fd2a0bef41",
    "o-lora-0.3.0/lorary.json": "13415cbb298095463eb970f21e493b76b7cb09ab580a4bf5b0d423c15dbd5de9",
    "delta-lora-0.3.0/adapter.safetensors": "df3f0600506f27d7f19676ca9726f97efca54768be6195dec7ff4cd3d6419024",
    "delta-lora-0.3.0/lorary.json": "beb4fed20c0fcf0767f3b7686bef349b4e437c74c07eb86109fcf1a68c6f65f9",
    "shared-0.3.0/adapter_config.json": "ad6476a8ad75ac8a822c5e890388691f9377f6331ec35b0d66924d2ba2f865f7",
    "shared-0.3.0/adapter_model.safetensors": "c70d1597971b586ea6230500c4b878e9968341bbfeff6c456f22d07886ba026b",
    "shared-0.3.0/lorary.json": "f628e27b548307334b69fffe48b177302bbd7c07baa63aaa497a4205eb7f9239",
    "shared-own-0.3.0/adapter.safetensors": "0a40de2f140983e0ddd72e07f10360c62ea0928532e9a03232077bb61a4329d5",
    "shared-own-0.3.0/lorary.json": "35dc2ca489c7ae2cc8413741763721be4fbf2be67299ce70ab9d201e4ec0e122",
    "qlora-0.4.0/adapter_config.json": "aa237b48862e5b6088101b57b259090f9421ae29ac60ff05ba9be118530069d5",
    "qlora-0.4.0/adapter_model.safetensors": "17a4b9feb2baebd85a9efd18efa4e8e729d6db5bd5e1d197f2fed561ad31d79f",
    "qlora-0.4.0/lorary.json": "f2618042c4f3692f35d70810ae0264c9991ce7d13ce61e13414284554603809f",
    "qpissa-0.4.0/adapter.safetensors": "9a7882370a3e66b7d31216d1697fa00bf73291d0ae80d2e74dd5a13dca3e7e76",
    "qpissa-0.4.0/lorary.json": "337baca1d10cf7c14972d61906787ad29dbc26309be3d3ca61b36315a47b215d",
    "longlora-0.5.0/adapter.safetensors": "651248eb3660691ad37f2c2af78c91125101bcac5e9056e13e129e005846084d",
    "longlora-0.5.0/lorary.json": "e13fb933e1db6fdf638f4649fde7d5bfcdbbccddd5da15706a24003dcc65fdc6",
    "lora-0.6.0/adapter_config.json": "851023a13e7b57d963ec182e33e731b592a778da852bde453286b080a5794427",
    "lora-0.6.0/adapter_model.safetensors": "5628e1335a848212dc0965faf637cad1a631b2d9d5c0da6c531569f75fde66a1",
    "lora-0.6.0/lorary.json": "ace885ca7818ae630bd1675492643b86b728ff6c720c34d6afe0fac0927a0502",
    "grouped-0.6.0/adapter.safetensors": "d6a91fc931fc5f19e49770779e83fa644cb1fdad83a290f6ac2f443e56aa49b6",
    "grouped-0.6.0/lorary.json": "0a120baac298b02eb2f04191031cdce1d7cf317b8711b41a447686c55a754c64",
    "pissa-0.6.0/adapter.safetensors": "54ddccef7a7afcc2836b30c90e467e03fc0989fb13a4272c4ef3430748b1b521",
    "pissa-0.6.0/lorary.json": "5cea69807324fa2674dd26b4f4c2adb5c9ef7413cd4d0e7c2d067dd49c11cd40",
    "vera-0.6.0/adapter_config.json": "36b380be468a0d035bed2779c0a0c33d8dead456d45d91ebb577aba62a4005c1",
    "vera-0.6.0/adapter_model.safetensors": "79a5effdcf130b7335889d551722610830b913e20c6df0e2ba8a901eac7e213a",
    "vera-0.6.0/lorary.json": "01cb88b1241a1cc611c43ca3b071d5314f3ee3eba87f2f355b0f777e585e142d",
    "vera-drawn-0.6.0/adapter.safetensors": "406136568c5be88054b84a65a144b5a3d62b9305bbf4a7264bced0601421b3dd",
    "vera-drawn-0.6.0/lorary.json": "78446f7c63d3a22d8149dc87391d0fe7ee284767c308203c63ff32149818f05a",
    "shared-own-0.6.0/adapter.safetensors": "0a40de2f140983e0ddd72e07f10360c62ea0928532e9a03232077bb61a4329d5",
    "shared-own-0.6.0/lorary.json": "1c50dbfb6d905824f7ba3bc621562c3c8fae995a0ba5cf563e221cfd99bec755",
    "longlora-0.6.0/adapter.safetensors": "651248eb3660691ad37f2c2af78c91125101bcac5e9056e13e129e005846084d",
    "longlora-0.6.0/lorary.json": "9ff04bcec8c954bdf8d9c52d68c79f2e4f93f9ded541c9f34fb8240aaa15bfe9",
}


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sevenths and their like, exact in 16 bits."""
    count = int(torch.Size(shape).numel())
    return ((torch.arange(count) * 37 % 64 - 31) / 64).reshape(shape).to(dtype)


def lora() -> Adapter:
    """Every kind of site that PEFT has, two ranks, a fused weight, biases and several dtypes."""
    method = lorary.method("rslora", "lora+", r=2, alpha=3, dropout=0.125, full=("bias",))
    small = lorary.method("rslora", "lora+", r=1, alpha=0.3, dropout=0.125, full=("bias",))
    sites = (
        Site("wte", "embedding", 4, 9, bias=False),
        Site("h.0.attn.c_attn", "transposed", 12, 4, bias=True, parts=(Part("q", 0, 4), Part("v", 8, 4))),
        Site("h.0.mlp.c_fc", "transposed", 8, 4, bias=True),
        Site("h.1.mlp.c_fc", "transposed", 8, 4, bias=True),
        Site("conv", "conv2d", 3, 12, bias=False, kernel_size=(3, 2)),
        Site("head.1", "linear", 5, 4, bias=False),
    )
    placed = tuple(AdaptedSite(site, small if site.name == "h.1.mlp.c_fc" else method) for site in sites)
    dtype = {"conv": torch.bfloat16, "head.1": torch.float16}
    tensors = {
        p.site.name: {
            role: numbers(*shape, dtype=dtype.get(p.site.name, torch.float32)) for role, shape in p.shapes.items()
        }
        for p in placed
    }
    full = {"h.0.mlp.c_fc.bias": numbers(8), "ln_f.bias": numbers(4)}
    return Adapter(method, placed, tensors, full, Fingerprint("GPT2LMHeadModel", "0" * 64, "1" * 64, "org/base"))


def grouped() -> Adapter:
    """What PEFT has no words for."""
    method = lorary.method("lora", r=2, alpha=8)
    placed = (AdaptedSite(Site("conv", "conv1d", 6, 4, bias=True, groups=2, kernel_size=(2,)), method),)
    tensors = {"conv": {role: numbers(*shape) for role, shape in placed[0].shapes.items()}}
    return Adapter(method, placed, tensors, {"norm.weight": numbers(6)}, Fingerprint("Net"))


def filled(placed: tuple[AdaptedSite, ...]) -> dict[str, dict[str, Tensor]]:
    """Numbers for every tensor of every site; what they share is one tensor, drawn or not."""
    method = placed[0].method
    banks = {role: numbers(*shape) for role, shape in shared_shapes(placed).items()}
    if method.init is not None and not method.init.store_shared:
        method.init.share(banks)
    parts = leading_slices(placed, banks)
    return {
        p.site.name: {r: numbers(*shape) for r, shape in p.stored.items() if r not in banks} | parts[p.site.name]
        for p in placed
    }


def dora() -> Adapter:
    """PEFT's magnitudes of every kind of site."""
    method = lorary.method("dora", "rslora", r=2, alpha=3)
    sites = (
        Site("wte", "embedding", 4, 9, bias=False),
        Site("attn.c_attn", "transposed", 12, 4, bias=True, parts=(Part("q", 0, 4), Part("v", 8, 4))),
        Site("conv", "conv2d", 3, 12, bias=False, kernel_size=(3, 2)),
        Site("head.1", "linear", 5, 4, bias=False),
    )
    placed = tuple(AdaptedSite(site, method) for site in sites)
    return Adapter(method, placed, filled(placed), {}, Fingerprint("Net"))


def pissa() -> Adapter:
    """Starts beside the factors, of one site with a rank of its own, and magnitudes."""
    method, small = (lorary.method("pissa", "dora", r=r, alpha=3, niter=4) for r in (2, 1))
    sites = (
        Site("attn.c_attn", "transposed", 12, 4, bias=True, parts=(Part("q", 0, 4), Part("v", 8, 4))),
        Site("mlp.c_fc", "transposed", 8, 4, bias=True),
    )
    placed = (AdaptedSite(sites[0], method), AdaptedSite(sites[1], small))
    return Adapter(method, placed, filled(placed), {"mlp.c_fc.bias": numbers(8)}, Fingerprint("Net"))


def qlora() -> Adapter:
    """How the base was kept, beside PEFT's plain files, which do not say it."""
    words = {"double": False, "block": 128, "compute": "bfloat16", "embeddings": True, "experts": False}
    method = lorary.method("qlora", "dora", "rslora", r=2, alpha=3, dropout=0.125, **words)
    sites = (Site("model.q", "linear", 4, 6, bias=False), Site("model.down", "linear", 6, 5, bias=True))
    placed = tuple(AdaptedSite(site, method) for site in sites)
    return Adapter(method, placed, filled(placed), {}, Fingerprint("Net", "0" * 64, "1" * 64))


def qpissa() -> Adapter:
    """Starts that were looked for in several rounds."""
    method = lorary.method("qlora", "pissa", r=2, alpha=3, rounds=5, experts=False)
    placed = (AdaptedSite(Site("model.q", "linear", 4, 6, bias=False), method),)
    tensors = filled(placed)
    tensors["model.q"]["A0"] = -tensors["model.q"]["A0"]  # it has moved since
    return Adapter(method, placed, tensors, {}, Fingerprint("Net"))


def vera() -> Adapter:
    """PEFT's VeRA, with its projections."""
    method = lorary.method("vera", r=3, seed=7, d=0.5)
    sites = (Site("model.q", "linear", 4, 6, bias=False), Site("model.down", "linear", 6, 5, bias=True))
    placed = tuple(AdaptedSite(site, method) for site in sites)
    return Adapter(method, placed, filled(placed), {}, Fingerprint("Net"))


def vera_drawn() -> Adapter:
    """Ranks that differ, which PEFT's VeRA has not, and no projections."""
    method, small = (lorary.method("vera", r=r, seed=7, save_projections=False) for r in (3, 2))
    sites = (Site("model.q", "linear", 4, 6, bias=False), Site("conv", "conv1d", 6, 8, bias=True, kernel_size=(2,)))
    placed = (AdaptedSite(sites[0], method), AdaptedSite(sites[1], small))
    return Adapter(method, placed, filled(placed), {}, Fingerprint("Net"))


def several() -> Adapter:
    """A site of MELoRA, one of MultiLoRA and one of OLoRA."""
    melora, multilora, olora = (lorary.method(name, r=2, alpha=3) for name in ("melora", "multilora", "olora"))
    sites = (
        Site("q", "linear", 4, 6, bias=False),
        Site("conv", "conv1d", 6, 4, bias=True, groups=2, kernel_size=(2,)),
        Site("wte", "embedding", 4, 9, bias=False),
    )
    placed = tuple(AdaptedSite(site, method) for site, method in zip(sites, (melora, multilora, olora), strict=True))
    return Adapter(melora, placed, filled(placed), {}, Fingerprint("Net"))


def glora() -> Adapter:
    """Every form of a term, each site with a structure of its own."""
    method, vectors = lorary.method("glora", r=2), lorary.method("glora", r=1, A="vector", B="scalar", D="scalar")
    sites = (Site("q", "linear", 4, 6, bias=True), Site("mlp.c_fc", "transposed", 8, 4, bias=True))
    placed = (AdaptedSite(sites[0], method), AdaptedSite(sites[1], vectors))
    return Adapter(method, placed, filled(placed), {}, Fingerprint("Net"))


def adalora() -> Adapter:
    """PEFT's AdaLoRA: all directions of one layer, one of another, none of the last."""
    method = lorary.method("adalora", r=3, target=1, alpha=6, start=2, final=3)
    sites = (
        Site("model.q", "linear", 4, 6, bias=False),
        Site("model.down", "linear", 6, 5, bias=True),
        Site("conv", "conv2d", 3, 12, bias=False, kernel_size=(3, 2)),
    )
    deltas = (SVDDelta(3), SVDDelta(3, kept=1), SVDDelta(3, kept=0))
    placed = tuple(AdaptedSite(site, method.replace(delta=delta)) for site, delta in zip(sites, deltas, strict=True))
    return Adapter(method, placed, filled(placed), {}, Fingerprint("Net"))


def o_lora() -> Adapter:
    """Three tasks in every kind of site, as one LoRA for PEFT; and a site that has no past."""
    method = lorary.method("o-lora", r=1, alpha=3)
    sites = (
        Site("wte", "embedding", 4, 9, bias=False),
        Site("attn.c_attn", "transposed", 12, 8, bias=True, parts=(Part("q", 0, 4), Part("v", 8, 4))),
        Site("conv", "conv2d", 3, 12, bias=False, kernel_size=(3, 2)),
        Site("head.1", "linear", 5, 4, bias=False),
    )
    past = ((1, 2), (2, 4), (1, 2), ())
    placed = tuple(AdaptedSite(s, method.replace(delta=SequentialLoRA(1, p))) for s, p in zip(sites, past, strict=True))
    return Adapter(method, placed, filled(placed), {}, Fingerprint("Net"))


def delta_lora() -> Adapter:
    """The product of step K beside that of now, and at one site no such product."""
    late, soon = (lorary.method("delta-lora", r=2, alpha=3, ratio=0.5, start=start) for start in (3, -1))
    sites = (Site("mlp.c_fc", "transposed", 8, 4, bias=True), Site("head.1", "linear", 5, 4, bias=False))
    placed = (AdaptedSite(sites[0], late), AdaptedSite(sites[1], soon))
    return Adapter(late, placed, filled(placed), {"norm.weight": numbers(4)}, Fingerprint("Net"))


def longlora() -> Adapter:
    """A base whose positions are divided, and an embedding and a norm in full."""
    context = LongContext(32, rope="yarn", shifted=False, groups=2, factor=4.0, known=8)
    method = lorary.method("longlora", "rslora", r=2, alpha=3).replace(context=context)
    placed = (AdaptedSite(Site("layers.0.q_proj", "linear", 4, 6, bias=False), method),)
    full = {"embed.weight": numbers(5, 6), "norm.weight": numbers(6)}
    return Adapter(method, placed, filled(placed), full, Fingerprint("LlamaForCausalLM"))


def shared() -> Adapter:
    """Two layers that train one LoRA, and one with its own, in a file of PEFT's."""
    return _sharing(lorary.method("lora", r=2, alpha=3))


def shared_own() -> Adapter:
    """The same in our own file, where what they share is there once."""
    return _sharing(lorary.method("melora", r=2, alpha=3))


def _sharing(method: lorary.Method) -> Adapter:
    sites = tuple(Site(f"layers.{i}.q", "linear", 4, 6, bias=False) for i in range(3))
    placed = tuple(AdaptedSite(site, method, share) for site, share in zip(sites, ("q 2", "", "q 2"), strict=True))
    tensors = filled(placed)
    tensors["layers.2.q"] = tensors["layers.0.q"]
    tensors["layers.1.q"] = {role: -t for role, t in tensors["layers.1.q"].items()}
    return Adapter(method, placed, tensors, {}, Fingerprint("Net"))


def of_preset(name: str) -> Callable[[], Adapter]:
    """A method as its preset says it, at rank 2."""

    def make() -> Adapter:
        if not lorary.presets()[name].adapts:
            full = {"norm.weight": numbers(6), "model.down.bias": numbers(6)}
            return Adapter(lorary.method(name), (), {}, full, Fingerprint("Net"))
        alpha: dict[str, Any] = {} if name in ("vera", "glora") else {"alpha": 3}
        method = lorary.method(name, **{"r": 2} | alpha | OPTIONS.get(name, {}))
        sites = (Site("model.q", "linear", 4, 6, bias=False), Site("model.down", "linear", 6, 4, bias=True))
        placed = tuple(AdaptedSite(site, method) for site in sites)
        tensors = filled(placed)
        for roles in tensors.values():
            if "A0" in roles:
                roles["A0"] = -roles["A0"]  # it has moved since
        return Adapter(method, placed, tensors, {}, Fingerprint("Net"))

    return make


def alone(*sites: Site, name: str, **options: Any) -> Callable[[], Adapter]:
    """A method whose join trains by itself, without a rank."""

    def make() -> Adapter:
        placed = tuple(AdaptedSite(site, lorary.method(name, **options)) for site in sites)
        return Adapter(placed[0].method, placed, filled(placed), {}, Fingerprint("Net"))

    return make


def waiting() -> Adapter:
    """An aLoRA, in PEFT's files: PEFT knows that the base is a causal language model."""
    made = alone(QUERY, DOWN, name="alora", invocation=(5, 7), r=2, alpha=3)()
    return replace(made, base=Fingerprint("LlamaForCausalLM"))


QUERY, KEY, VALUE = (Site(f"model.{name}_proj", "linear", 4, 6, bias=name == "v") for name in "qkv")
DOWN = Site("model.down_proj", "linear", 6, 4, bias=True)
TOKENS = Site("model.tokens", "embedding", 6, 9, bias=False)
FUSED = Site("attn.c_attn", "transposed", 12, 8, bias=True, parts=(Part("q", 0, 4), Part("v", 8, 4)))
NARROW = Site("attn.c_attn", "transposed", 12, 4, bias=True, parts=(Part("q", 0, 4), Part("v", 8, 4)))
HEAD = Site("head", "linear", 9, 6, bias=False)
ALONE = {
    "houlsby-0.6.0": alone(QUERY, DOWN, name="houlsby", m=2, norms=False),
    "ia3-0.6.0": alone(KEY, VALUE, DOWN, name="ia3"),
    "lora-bias-0.6.0": alone(QUERY, DOWN, FUSED, name="lora", r=2, alpha=3, lora_bias=True),
    "alora-0.6.0": waiting,
    "rows-0.6.0": alone(TOKENS, HEAD, name="rows", tokens=(3, 5)),
    "prefix-tuning-0.6.0": alone(KEY, VALUE, name="prefix-tuning", tokens=2),
    "prefix-network-0.6.0": alone(TOKENS, KEY, VALUE, name="prefix-tuning", tokens=2, mlp=3),
    "prompt-tuning-0.6.0": alone(TOKENS, name="prompt-tuning", tokens=2),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "adalora": {"target": 2, "start": 2, "final": 3},
    "glora": {"A": "lora"},
    "lokr": {"r": 1},
    "qlora": {"experts": False},  # no release before had any other
    "delta-lora": {"start": 499},  # 500 steps go before, as then with start=500
}
PRESETS = [
    *("lora", "rslora", "lora+", "lora-fa", "qlora", "dora", "glora", "pissa", "olora", "vera", "melora", "multilora"),
    *("adalora", "delta-lora", "o-lora", "bitfit", "full"),
]
SCALED = {
    # HiRA's and MiSS's files of PEFT, and what PEFT has no place for: parts of a fused weight, rows that repeat there
    "hira-0.6.0": alone(QUERY, DOWN, TOKENS, name="hira", r=2, dropout=0.125),
    "miss-0.6.0": alone(QUERY, DOWN, name="miss", r=3),
    "miss-own-0.6.0": alone(NARROW, name="miss", r=3, mini_r=2),
}
STARTS = {f"{name}-0.6.0": of_preset(name) for name in ("loftq", "lora-ga", "corda", "eva", "loha", "lokr")}
ADAPTERS = {f"{name.replace('+', '-plus')}-0.5.0": of_preset(name) for name in PRESETS} | {
    "longlora-0.5.0": longlora,
    "qlora-0.4.0": qlora,
    "qpissa-0.4.0": qpissa,
    "adalora-0.3.0": adalora,
    "o-lora-0.3.0": o_lora,
    "delta-lora-0.3.0": delta_lora,
    "shared-0.3.0": shared,
    "shared-own-0.3.0": shared_own,
    "glora-0.2.0": glora,
    "lora-0.1.0": lora,
    "grouped-0.1.0": grouped,
    "dora-0.2.0": dora,
    "pissa-0.2.0": pissa,
    "vera-0.2.0": vera,
    "vera-drawn-0.2.0": vera_drawn,
    "several-0.2.0": several,
    "lora-0.6.0": lora,
    "dora-0.6.0": dora,
    "grouped-0.6.0": grouped,
    "pissa-0.6.0": pissa,
    "vera-0.6.0": vera,
    "vera-drawn-0.6.0": vera_drawn,
    "shared-own-0.6.0": shared_own,
    "longlora-0.6.0": longlora,
    **ALONE,
    **STARTS,
    **SCALED,
}


@pytest.mark.parametrize("path", FILES)
def test_the_files_are_those_of_the_release(path: str) -> None:
    assert hashlib.sha256((GOLDEN / path).read_bytes()).hexdigest() == FILES[path]


def test_no_other_file_is_there() -> None:
    assert {p.relative_to(GOLDEN).as_posix() for p in GOLDEN.rglob("*") if p.is_file()} == set(FILES)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_golden_folder_loads_to_the_last_bit(name: str) -> None:
    read, expected = lorary.load_adapter(GOLDEN / name), ADAPTERS[name]()
    assert (read.method, read.sites, read.base) == (expected.method, expected.sites, expected.base)
    for site, roles in expected.tensors.items():
        assert {role: t.dtype for role, t in read.tensors[site].items()} == {r: t.dtype for r, t in roles.items()}
        assert all(torch.equal(read.tensors[site][role], t) for role, t in roles.items())
    for p in read.sites:  # what sites share is one tensor
        alike = [q.site.name for q in read.sites if q.share and q.share == p.share]
        assert all(read.tensors[name][r] is t for name in alike for r, t in read.tensors[p.site.name].items())
    assert read.full.keys() == expected.full.keys()
    assert all(torch.equal(read.full[key], t) for key, t in expected.full.items())


@pytest.mark.parametrize("name", ADAPTERS)
def test_todays_writer_gives_the_same_bytes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, golden = tmp_path / name, GOLDEN / name
    monkeypatch.setattr("lorary.adapters.native.__version__", name.rpartition("-")[2])
    lorary.save_adapter(ADAPTERS[name](), written)
    assert {path.name for path in written.iterdir()} == {path.name for path in golden.iterdir()}
    if name in MAGNITUDES:
        golden = rename_magnitudes(golden, tmp_path / "golden")
    for path in sorted(written.iterdir()):
        if path.name == "lorary.json" and (record := json.loads((golden / path.name).read_text()))["format"] == 1:
            assert_same_record(json.loads(path.read_text()), record)
        else:
            assert path.read_bytes() == (golden / path.name).read_bytes(), path.name


MAGNITUDES = ("dora-0.2.0", "qlora-0.4.0", "dora-0.5.0")  # their magnitudes have PEFT's own name


def rename_magnitudes(golden: Path, folder: Path) -> Path:
    """The files of an older release with DoRA's magnitudes under the name that they have since."""
    folder.mkdir()
    old = load_file(golden / WEIGHTS)
    assert any(name.endswith(".lora_magnitude_vector") for name in old)
    new = {f"{k}.weight" if k.endswith(".lora_magnitude_vector") else k: t for k, t in old.items()}
    write_tensors(folder / WEIGHTS, new)
    data, record = (folder / WEIGHTS).read_bytes(), json.loads((golden / "lorary.json").read_text())
    record["files"][WEIGHTS] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "lorary.json").write_text(json.dumps(record))
    (folder / "adapter_config.json").write_bytes((golden / "adapter_config.json").read_bytes())
    return folder


def assert_same_record(new: dict[str, Any], old: dict[str, Any]) -> None:
    """A record of format 2 says what one of format 1 says, in the same order, but for the names."""
    assert (new.pop("format"), old.pop("format")) == (2, 1)
    new["method"], new["sites"] = in_format_1(new["method"]), [in_format_1(site) for site in new["sites"]]
    assert json.dumps(new) == json.dumps(old)


# the names of format 2 -> those of format 1, written out here so that the reader's own table is tested too
OLD_KEYS = {"component": "word", "out_features": "out", "in_features": "inp", "kernel_size": "window"}
OLD_COMPONENTS = {
    "AlphaOverInitialRank": "ByStartRank",
    "AlphaOverRank": "ByRank",
    "AlphaOverSqrtRank": "BySqrtRank",
    "BlockDiagonal": "Minis",
    "ConstantScale": "Fixed",
    "DeltaLoRADelta": "Propagated",
    "DeltaLoRAPaperRule": "WriteProduct",
    "DeltaLoRARule": "FollowProduct",
    "GLoRADelta": "Terms",
    "GLoRAJoin": "Supports",
    "LongContext": "Extended",
    "MagnitudeDirection": "Direction",
    "MultiLoRAInit": "Balanced",
    "OrthogonalToPast": "AwayFrom",
    "OrthogonalityPenalty": "Orthogonal",
    "ParallelLowRank": "Parallel",
    "QRInit": "Orthonormal",
    "SVDDelta": "Spectral",
    "SVDDeltaInit": "SmallNormal",
    "SVDInit": "Principal",
    "SequentialLoRA": "Tasks",
    "SharedProjectionDelta": "Vectors",
    "SharedProjectionInit": "Projections",
    "Unquantized": "AsIs",
    "ZeroDownInit": "ZeroDown",
}


def in_format_1(value: Any) -> Any:
    """A value of a record of format 2, with the names of format 1."""
    if isinstance(value, list):
        return [in_format_1(item) for item in value]
    if not isinstance(value, dict):
        return value
    keys = OLD_KEYS | ({"store_shared": "saved"} if value.get("component") == "SharedProjectionInit" else {})
    old = {keys.get(key, key): in_format_1(item) for key, item in value.items()}
    return old | ({"word": OLD_COMPONENTS.get(old["word"], old["word"])} if "word" in old else {})


def test_every_preset_has_a_golden_folder() -> None:
    """In the last release of format 1; a new preset needs a folder of the release that brings it."""
    newer = {name.rpartition("-")[0] for name in [*ALONE, *STARTS, *SCALED]} - {
        "prefix-network",
        "lora-bias",
        "miss-own",
    }
    assert {*PRESETS, "longlora", *newer} == set(lorary.presets())


def test_the_golden_folders_hold_every_renamed_component_but_one() -> None:
    """Delta-LoRA's paper rule writes the base each step and has no folder of its own."""
    text = "".join(path.read_text() for path in GOLDEN.glob("*/lorary.json"))
    assert set(_deprecated.COMPONENTS) == set(OLD_COMPONENTS.values())
    assert {old for old in OLD_COMPONENTS.values() if f'"word": "{old}"' not in text} == {"WriteProduct"}


def test_the_format_page_lists_the_names_of_format_1() -> None:
    page = (GOLDEN.parents[1] / "docs" / "reference" / "files.md").read_text(encoding="utf-8")
    assert all(f"\n| `{old}` | `{new}` |\n" in page for new, old in OLD_COMPONENTS.items())
