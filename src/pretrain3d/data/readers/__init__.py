"""Raw formats and public data sets, each read by one file."""

READERS = {
    "nndetection": "pretrain3d.data.readers.nndetection:NnDetection",
    "nnunet": "pretrain3d.data.readers.nnunet:NnUNet",
    "openkbp": "pretrain3d.data.readers.openkbp:OpenKbp",
    "ribfrac": "pretrain3d.data.readers.ribfrac:RibFrac",
    "luna16": "pretrain3d.data.readers.luna16:Luna16",
    "images": "pretrain3d.data.readers.images:Images",
}
