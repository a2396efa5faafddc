"""Time the embedding of CGD's original program. Python 3.8 with MXNet 1.9.1 only.

    python3.8 original_cgd.py make PREFIX
    python3.8 original_cgd.py measure PREFIX IMAGES N_REPEATS BATCH ...

"make" writes a checkpoint, PREFIX-symbol.json and PREFIX-0000.params: ResNet-50 v1 of MXNet's model zoo, without its
head, then SPoC, MAC and GeM (p = 3), each reduced to 512 values, side by side: 1,536. Its weights are random. "measure"
loads it as the original's test.py does (a module, bound for inference, on the CPU) and embeds IMAGES, an .npy of uint8
(N, 224, 224, 3), so many at a time. They are normalised beforehand, which is not timed. The last line printed is a JSON
object; cgd_speed.py reads it.
"""

import json
import sys
import time

import mxnet as mx
import numpy as np

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make(prefix):
    mx.random.seed(0)
    data = mx.sym.var("data")
    network = mx.gluon.model_zoo.vision.resnet50_v1()
    network.initialize(mx.init.Xavier())
    x = data
    for layer in network.features._children.values():
        if not isinstance(layer, mx.gluon.nn.GlobalAvgPool2D):
            x = layer(x)
    pools = {
        "spoc": x.mean(axis=(2, 3)),
        "mac": x.max(axis=(2, 3)),
        "gem": (mx.sym.maximum(x, 1e-6) ** 3.0).mean(axis=(2, 3)) ** (1 / 3.0),
    }
    parts = []
    for name, pooled in pools.items():
        dense = mx.sym.FullyConnected(pooled, num_hidden=512, no_bias=True, name="fc_" + name)
        parts.append(mx.sym.L2Normalization(dense))
    symbol = mx.sym.L2Normalization(mx.sym.Concat(*parts, dim=1))
    module = mx.mod.Module(symbol, label_names=None, context=mx.cpu())
    module.bind([("data", (1, 3, 224, 224))], for_training=False)
    module.init_params(mx.init.Xavier(rnd_type="gaussian", factor_type="in", magnitude=2))
    mx.model.save_checkpoint(prefix, 0, symbol, *module.get_params())


def measure(prefix, images, n_repeats, batches):
    symbol, parameters, states = mx.model.load_checkpoint(prefix, 0)
    images = ((np.load(images) / 255.0 - MEAN) / DEVIATION).astype(np.float32).transpose(0, 3, 1, 2)
    found = {"mxnet": mx.__version__}
    for batch in batches:
        module = mx.mod.Module(symbol, label_names=None, context=mx.cpu())
        module.bind([("data", (batch, *images.shape[1:]))], for_training=False)
        module.set_params(parameters, states)
        seconds = []
        for _ in range(1 + n_repeats):  # the first one plans
            start, parts = time.perf_counter(), []
            for at in range(0, len(images), batch):
                module.forward(mx.io.DataBatch([mx.nd.array(images[at : at + batch])]), is_train=False)
                parts.append(module.get_outputs()[0].asnumpy())
            seconds.append((time.perf_counter() - start) / len(images))
        found[f"seconds_an_image_{batch}"] = seconds[1:]
    np.save(prefix + ".npy", np.concatenate(parts))
    return found


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(sys.argv[2])
    else:
        print(json.dumps(measure(*sys.argv[2:4], int(sys.argv[4]), [int(batch) for batch in sys.argv[5:]])))
