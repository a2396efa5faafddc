"""Images of the embedded sample as files, for what reads files."""


def write_sample(folder, n_image=40):
    """Write so many images of each class of CIFAR-10 as folder/<class>/<number>.png, if the folder is not there yet.

    Args:
        folder: pathlib.Path.
        n_image: int.

    Returns:
        pathlib.Path, the folder.
    """
    from PIL import Image

    from gpq_tf import data

    if folder.exists():
        return folder
    sample = data.load("cifar10_sample")
    for label, name in enumerate(sample.class_names):
        (folder / name).mkdir(parents=True)
        for i, image in enumerate(sample.gallery_images[sample.gallery_labels == label][:n_image]):
            Image.fromarray(image).save(folder / name / f"{i}.png")
    return folder
