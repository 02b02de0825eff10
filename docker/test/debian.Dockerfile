# The public images' stand-ins, for machines that can pull none: Debian's packages on a base made with debootstrap,
# with the same users, paths and entry points as far as docker-compose.yml relies on them.
ARG BASE
FROM ${BASE} AS redis
RUN apt-get update && apt-get install --yes --no-install-recommends redis-server && rm -rf /var/lib/apt/lists/*
RUN install -d -o redis -g redis /data
VOLUME /data
WORKDIR /data
CMD ["redis-server"]

FROM ${BASE} AS proxy
RUN apt-get update && apt-get install --yes --no-install-recommends haproxy wget && rm -rf /var/lib/apt/lists/*
USER haproxy
CMD ["haproxy", "-W", "-db", "-f", "/usr/local/etc/haproxy/haproxy.cfg"]

FROM ${BASE} AS prometheus
RUN apt-get update && apt-get install --yes --no-install-recommends prometheus && rm -rf /var/lib/apt/lists/*
RUN install -d -o nobody -g nogroup /prometheus
USER nobody
VOLUME /prometheus
ENTRYPOINT ["/usr/bin/prometheus"]
