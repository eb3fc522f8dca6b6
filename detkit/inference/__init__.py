"""Running a detector on images, folders and videos: from a source of frames to Detections."""
