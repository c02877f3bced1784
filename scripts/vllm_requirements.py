"""Print what a vLLM wheel needs apart from torch and its companions, one requirement a line.

torch is installed first and pinned; torchaudio, torchvision and torchcodec serve images and sound, which hiexp never
sends, and have no CPU build on every index. Usage: vllm_requirements.py WHEEL
"""

import sys
import zipfile
from email.parser import HeaderParser

from packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec"}


def requirements(wheel: str) -> list[str]:
    """The requirements of the wheel file that hold on this machine without any extra."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = HeaderParser().parsestr(archive.read(name).decode())
    wanted = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    here = [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    return [str(r).split(";")[0].strip() for r in here if r.name.lower() not in LEFT_OUT]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print("\n".join(requirements(sys.argv[1])))
