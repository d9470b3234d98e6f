# What the image steps share: making images with umoci, and comparing trees.
# shellcheck shell=bash
coffer=${CARGO_TARGET_DIR:-$root/target}/debug/coffer
[ -x "$coffer" ] || cargo build -q -p coffer

# fill DIRECTORY N: the Nth change to a tree: files, links, attributes, removals, directories emptied and refilled.
fill() {
    local d=$1 n=$2
    mkdir -p "$d/l$n/deep/er" "$d/shared" "$d/churn"
    head -c $((n * 1000 + 7)) /dev/urandom >"$d/l$n/deep/er/random"
    echo "layer $n" >"$d/shared/changes"
    echo "layer $n" >"$d/shared/$n"
    ln "$d/l$n/deep/er/random" "$d/l$n/hard"
    ln -s ../shared/changes "$d/l$n/soft"
    ln -sfn /shared "$d/absolute"
    chmod 4751 "$d/l$n/hard"
    chown 1000:$n "$d/shared/$n"
    touch -d "2001-02-03 04:05:0$((n % 10)).$n" "$d/shared/$n"
    setfattr -n user.layer -v "$n" "$d/shared/$n"
    mkdir -m 1777 "$d/l$n/$(printf 'n%.0s' $(seq 200))"
    : >"$d/l$n/$(printf 'n%.0s' $(seq 200))/$(printf 'f%.0s' $(seq 100)) with ünicode"
    [ "$n" -lt 3 ] || rm -rf "$d/shared/$((n - 2))" "$d/l$((n - 2))/deep"
    [ $((n % 5)) != 0 ] || { rm -rf "$d/churn" && mkdir "$d/churn" && echo "$n" >"$d/churn/only"; }
    [ $((n % 7)) != 0 ] || { rm -rf "$d/l$((n - 1))" && echo "a file now" >"$d/l$((n - 1))"; }
    [ "$n" != 2 ] || { mkfifo "$d/pipe" && mknod "$d/null" c 1 3; }
    [ "$n" != 2 ] || { cp /bin/true "$d/capable" && setfattr -n security.capability -v 0x0100000200040000000000000000000000000000 "$d/capable"; }
}

# image LAYOUT TAG LAYERS: by umoci, so that neither the tar nor the layout is this project's.
image() {
    local layout=$1 tag=$2 layers=$3 bundle=$work/bundle-$2 n
    [ -e "$layout" ] || umoci init --layout "$layout"
    umoci new --image "$layout:$tag"
    umoci unpack --image "$layout:$tag" "$bundle" 2>/dev/null
    for n in $(seq "$layers"); do
        fill "$bundle/rootfs" "$n"
        umoci repack --refresh-bundle --image "$layout:$tag" "$bundle" >/dev/null 2>&1
    done
    umoci config --image "$layout:$tag" --config.entrypoint /bin/app --config.cmd serve --config.user 1000:7 \
        --config.env MODE=test --config.workingdir /srv --config.stopsignal SIGINT
    rm -rf "$bundle"
}

digest() { # digest LAYOUT TAG
    python3 -c 'import json, sys
print(next(m["digest"] for m in json.load(open(sys.argv[1] + "/index.json"))["manifests"]
           if m.get("annotations", {}).get("org.opencontainers.image.ref.name") == sys.argv[2]))' "$1" "$2"
}

# like_umoci WHAT LAYOUT TAG DIRECTORY: the tree is what umoci unpacks.
like_umoci() {
    umoci unpack --image "$2:$3" "$work/by-umoci" >/dev/null 2>&1
    tests/images/tree "$work/by-umoci/rootfs" >"$work/by-umoci.txt"
    tests/images/tree "$4" >"$work/by-coffer.txt"
    diff -u "$work/by-umoci.txt" "$work/by-coffer.txt" | head -20 >"$work/diff" || true
    [ ! -s "$work/diff" ] || fail "$1: umoci and coffer differ: $(cat "$work/diff")"
    ok "$1: $(wc -l <"$work/by-coffer.txt") entries as umoci unpacks them"
    rm -rf "$work/by-umoci" "$4"
}
