"""What ``predict`` writes: records, drawn images, crops, label files and annotated videos."""
