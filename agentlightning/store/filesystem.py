"""Detection of network file systems."""

from __future__ import annotations

import os
import re
from pathlib import Path

__all__ = ["network_file_system"]

MOUNTS = Path("/proc/self/mounts")
NETWORK = {
    "9p", "afs", "beegfs", "ceph", "cifs", "fhgfs", "gfs2", "glusterfs", "gpfs", "lustre", "ncpfs", "nfs", "nfs4",
    "ocfs2", "orangefs", "panfs", "pvfs2", "smb2", "smb3", "smbfs", "vboxsf", "wekafs",
    "fuse.beegfs", "fuse.blobfuse", "fuse.blobfuse2", "fuse.ceph", "fuse.davfs", "fuse.gcsfuse", "fuse.glusterfs",
    "fuse.goofys", "fuse.juicefs", "fuse.mount-s3", "fuse.quobyte", "fuse.rclone", "fuse.s3fs", "fuse.seaweedfs",
    "fuse.sshfs",
}  # fmt: skip
"""File systems, by their names in the kernel, that several hosts may mount or that keep files elsewhere."""


def network_file_system(path: Path) -> str | None:
    """Return the name of the network file system that a path is on, which need not exist yet; None where it is local.

    Where the operating system does not tell, as outside Linux, every path counts as local.
    """
    try:
        table = os.fsdecode(MOUNTS.read_bytes())
    except OSError:
        return None
    path, found = path.resolve(), (0, "")
    for _, mounted_on, kind, *_ in (line.split(" ") for line in table.rstrip("\n").split("\n")):
        # Spaces and the like are escaped in octal.
        point = Path(re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), mounted_on))
        # The deepest mount counts; of two on the same directory the last, which hides the other.
        if path.is_relative_to(point) and len(point.parts) >= found[0]:
            found = (len(point.parts), kind)
    return found[1] if found[1] in NETWORK else None
