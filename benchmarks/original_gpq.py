"""Time the original GPQ program: a training step and encoding. Runs under Python 3.7 with TensorFlow 1.14 only.

    python3.7 original_gpq.py CHECKOUT N_STEPS N_IMAGES

CHECKOUT is a copy of the original's repository. Its train.py does not parse (a positional argument after a named one),
so its graph is put together here from the original's own functions. The last line printed is a JSON object with the
seconds of every step and of every encoded batch; gpq_speed.py reads it.
"""

import json
import random
import sys
import time


def main():
    checkout, n_steps, n_images = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    sys.path.insert(0, checkout)
    import numpy as np
    import tensorflow as tf
    from utils import Functions, GPQ_network

    import config

    net = GPQ_network.GPQ(training=GPQ_network.training_flag)
    prototypes = Functions.Intra_Norm(net.Prototypes, config.n_book)
    codewords = Functions.Soft_Assignment(prototypes, net.Z, config.n_book, config.alpha)
    descriptors = net.F(GPQ_network.x)
    labelled = Functions.Intra_Norm(descriptors, config.n_book)
    unlabelled = Functions.Intra_Norm(Functions.flip_gradient(net.F(GPQ_network.x_T)), config.n_book)
    quantized = Functions.Soft_Assignment(codewords, labelled, config.n_book, config.alpha)
    directions = tf.transpose(prototypes) * config.beta
    logits = net.C(labelled * config.beta, directions)
    terms = [
        Functions.N_PQ_loss(GPQ_network.label_Mat, labelled, quantized, config.n_book),
        config.lam_2 * Functions.CLS_loss(GPQ_network.label, logits),
        config.lam_1 * Functions.SME_loss(unlabelled * config.beta, directions, config.n_book),
    ]
    rate = tf.train.exponential_decay(0.0002, GPQ_network.global_step, 100, 0.95, staircase=True)
    train = tf.train.AdamOptimizer(learning_rate=rate, beta1=0.5).minimize(sum(terms))

    rng = np.random.RandomState(0)
    random.seed(0)
    size, side = config.batch_size, config.image_size
    # float32, as the original holds its images: normalised once, when they are read
    labelled_images = rng.standard_normal((5000, side, side, 3)).astype("float32")
    unlabelled_images = rng.standard_normal((20000, side, side, 3)).astype("float32")
    all_labels = rng.randint(0, config.n_CLASSES, 5000)
    result = {"tensorflow": tf.__version__, "draw_s": [], "step_s": [], "encode_s": []}
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        for step in range(n_steps):
            start = time.perf_counter()
            chosen = rng.choice(len(labelled_images), size=size, replace=False)
            onehot = np.eye(config.n_CLASSES)[all_labels[chosen]]
            same = onehot.dot(onehot.T)
            feed = {
                GPQ_network.x: Functions.data_augmentation(labelled_images[chosen]),
                GPQ_network.label: onehot,
                GPQ_network.label_Mat: same / same.sum(axis=1, keepdims=True),
                GPQ_network.training_flag: True,
                GPQ_network.global_step: step,
            }
            chosen = rng.choice(len(unlabelled_images), size=size, replace=False)
            feed[GPQ_network.x_T] = Functions.data_augmentation(unlabelled_images[chosen])
            drawn = time.perf_counter()
            session.run([train, *terms], feed_dict=feed)
            result["draw_s"].append(drawn - start)
            result["step_s"].append(time.perf_counter() - start)
        batch = config.n_DB // 100  # the original's own size
        for first in range(0, n_images, batch):
            images = unlabelled_images[first : first + batch]
            start = time.perf_counter()
            session.run(descriptors, feed_dict={GPQ_network.x: images, GPQ_network.training_flag: False})
            result["encode_s"].append((time.perf_counter() - start) / len(images))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
