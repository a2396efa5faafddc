"""Settings of GPQ-TF. Edit them here, or override any on the command line: python train.py --n_book=8

Values are those of the head gpq. Where a comment names another for spq or cgd, that one is meant with this head, unless
the value here is changed, or given on the command line.
"""

# --- data: 5,000 labelled images (source), 54,000 without labels (target and gallery), 1,000 queries
data_dir = "./cifar10"  # folder of CIFAR-10's python version (data_batch_1..5, test_batch, batches.meta), or your own
# cgd: "./data/CUB_200_2011", as its archive unpacks
dataset = "cifar10"  # the folder, else tensorflow-datasets, else the sample; cifar10_folder, _tfds, _sample ask for one
# dataset image_folders: your own images, in data_dir a folder a class, or train/ and test/ with such folders
# cgd: cub200, image_lists (as the original's: train.txt, test.txt, bbox.txt in meta_dir), image_folders (without train/
# and test/ it searches among the second half of the classes), or what tensorflow-datasets prepared: caltech_birds2011,
# cars196, stanford_online_products; cgd_sample is 768 images inside the package (Demo.py's while data_dir is absent)
download = False  # True: tensorflow-datasets may fetch what is missing from the network, and Keras its ImageNet weights
meta_dir = None  # cgd: folder of the original's lists of images; None: the folder meta in data_dir
boxes = True  # cgd: cut images to their boxes, where there are boxes

# --- files
ImagNet_pretrained_path = "./models/ImageNet_pretrained"  # .mat to start training from, the original's spelling
ImageNet_pretrained_path = ImagNet_pretrained_path  # the same, spelled right
model_save_path = "./models/"  # folder that train.py writes into
model_load_path = "./models/48bits_example.ckpt"  # .keras, shipped name or TF1 prefix; while absent: the shipped model
# spq: "./models/spq_32bits_best.keras", cgd: "./models/cgd_1536d_best.keras", which train.py writes
cifar10_label_sim_path = "./cifar10/cifar10_Similarity.mat"  # what is relevant to each query; while absent: the labels

# --- protocol
n_CLASSES = 10  # classes; where it is left so, those that the data have
image_size = 32  # pixels, height and width; images of another size are resized; cgd: 224, trained on windows of 252
img_channels = 3  # red, green, blue
n_DB = 54000  # ranks that enter the mAP; all, where the gallery is smaller; spq: 1000

# --- training
total_epochs = 300  # passes over the labelled images, 10 steps each; spq: 5000, over all images; cgd: 33
batch_size = 500  # labelled images a step, and as many unlabelled ones; spq: 256, each in two views; cgd: 128
save_term = 20  # epochs between saves
eval_epoch = None  # epochs between evaluations on all queries, the best model is kept; None: never; spq: 100; cgd: 1
images_per_class = 4  # cgd: images of a class in a batch, which has batch_size / images_per_class classes
learning_rate = None  # Adam's at first; None: 2e-4, the original's; spq: 3e-4; cgd: 1e-4, or 3e-3 from scratch

# --- code
head = "gpq"  # what turns features into codes, and learns to: gpq from few labels, spq from none, cgd from class labels
len_code = 12  # values of a codeword; spq: 16
n_book = 12  # codebooks; spq: 8; cgd: 0, which is none
bn_word = 4  # bits of a book; cgd: 8
intn_word = pow(2, bn_word)  # codewords of a book, derived
n_bits = n_book * bn_word  # bits of a code, derived

# --- descriptor of cgd
descriptors = "SMG"  # what is combined, in this order: S (SPoC), M (MAC), G (GeM); the first is classified as well
n_dim = 1536  # values of a descriptor; 0: as many as the pooled features have, without dense layers
combination = "concat"  # branches of n_dim / len(descriptors) values side by side, or their sum
gem_p = 3.0  # power of GeM, the paper's
learn_p = False  # True: gem_p is where the power begins, and it is learnt
backbone = "resnet_v1"  # ResNet-50, last stage without stride; keras_cv: that of keras-cv, whose paddings differ

# --- losses
alpha = 20.0  # scale of the soft assignment: larger is harder; spq: 5.0
beta = 4.0  # scale of features and prototypes in the classifier
lam_1 = 0.1  # weight of the entropy loss (unlabelled images)
lam_2 = 0.1  # weight of the classification loss
temperature = 0.5  # spq: of the contrast between views; cgd: of the classifier
margin = 0.1  # cgd: by which a triplet's distances are to differ
squared = False  # cgd: True: its squared distances
smoothing = 0.1  # cgd: of the classifier's labels
auxiliary = True  # cgd: classify the first descriptor's pooled features as well
augment = "simclr"  # spq: how views are made; spq2021 is what the original's libraries did (its default with legacy)
crop_area = None  # gpq: least share that a random crop keeps of an image (.35), stretched to its size; None: shifts it

# --- new here
width_multiplier = 1.0  # scales every channel count; .25 trains on a laptop
legacy = False  # True: split and score exactly as the original, its faults included (docs/legacy.md)
seed = 0  # of initial values, batches, augmentation and the query shown
precision = "float32"  # or mixed_bfloat16 (fast on recent processors), mixed_float16 (older GPUs)
jit_compile = "auto"  # XLA for the whole training step: auto is yes on one GPU, no on a CPU, where it is slower
strategy = "auto"  # one device; mirrored: all of this machine; multiworker: as TF_CONFIG tells; auto: what there is
sync_batch_norm = True  # with several devices: batch statistics of the whole batch, not of each device's part
clip_norm = None  # largest length of the gradient of all weights together; None leaves it as it is
accumulate = 1  # parts of a batch that go through the network one after the other, to save memory (docs/scaling.md)
init = None  # model to start training from (.keras, shipped name, TF1 prefix); None: scratch; cgd: imagenet, which is
# Keras's ResNet50 (a .h5 file): downloaded before, else ImageNet_pretrained_path, else --download=True, else scratch
resume = None  # saved model whose training goes on, with the settings it was saved with; last: the newest, if any
tensorboard = False  # True: curves, ranked lists and codebook usage into model_save_path/tensorboard
keep = None  # newest models to keep; None keeps all; spq, cgd: 3
query = None  # index of the query that Demo.py shows; None draws one
query_image = None  # image file of any size: Demo.py shows the ten images nearest to it, and takes no mAP
n_pictures = 1  # ranked-list pictures that Demo.py saves
