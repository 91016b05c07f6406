# The quick start in a container, on the CPU: `docker build -t curriculum . && docker run --rm curriculum`.
# Keep the students with `-v "$PWD/runs:/curriculum/runs"`; for another command write it at the end, as `docker run --rm
# curriculum hf-curriculum-distill plan bert_large --student bert-6-768 --teacher bert-large --gpu h100`; models and data
# of the Hub take `-e HF_HUB_OFFLINE=0`.
FROM python:3.11-slim

WORKDIR /curriculum
ENV HF_HUB_OFFLINE=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
COPY constraints.txt ./
RUN pip install --index-url https://download.pytorch.org/whl/cpu "$(grep ^torch== constraints.txt)"
COPY . .
RUN pip install --constraint constraints.txt ".[plots]"

CMD ["hf-curriculum-distill", "train", "bert_large", "--config", "recipes/configs/bert_large/quickstart.yaml"]
