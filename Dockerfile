# docker build -t detkit . && docker run --rm -v "$PWD/runs:/app/runs" detkit
# Without CUDA, a much smaller image: docker build --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu ...
FROM python:3.12-slim

# The number is also the group of the volumes in configs/cluster/pytorchjob.yml.
RUN useradd --uid 1000 --create-home detkit && mkdir -p /app/runs && chown -R detkit /app
WORKDIR /app
COPY --chown=detkit pyproject.toml README.md LICENSE ./
COPY --chown=detkit detkit detkit
COPY --chown=detkit configs configs
COPY --chown=detkit tools tools
ARG PIP_EXTRA_INDEX_URL
RUN pip install --no-cache-dir .

USER detkit
VOLUME /app/runs
CMD ["python", "tools/train.py", "model=yolov8s", "backbone=revcol_tiny"]
