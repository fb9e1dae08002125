"""How do images, labels and CAMs become shards? COCO, VOC, folders, foreign tars, CAM files; writing, checking, statistics."""
