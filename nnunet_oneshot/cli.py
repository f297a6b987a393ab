"""The command ``nnunet_oneshot``: every subcommand parses its arguments and calls one function."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence

from nnunet_oneshot import __version__
from nnunet_oneshot.errors import OneShotError, exit_status
from nnunet_oneshot.registry import load_modules

# Handlers import what they run, so that `--help`, `--version` and `env` answer without loading torch.


def _fold_number(text: str) -> str:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a fold: give a number such as 0")
    return text


def _fold(text: str) -> str:
    if text != "all" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a fold: give a number such as 0, or all")
    return text


def _one_of(load: Callable[[], Iterable[str]], *, default: str) -> Callable[[str], str]:
    """Type of an option that takes a name of a registry, which is loaded when another than the default is given."""

    # As `choices`, the names would be loaded for every help text, and torch with them.
    def check(text: str) -> str:
        if text != default:
            names = list(load())
            if text not in names:
                raise argparse.ArgumentTypeError(
                    f"invalid choice: {text!r} (choose from {', '.join(map(repr, names))})"
                )
        return text

    return check


def _load_registries() -> None:
    """Makes all registered names known, against which those in settings are checked."""
    import nnunet_oneshot.registries  # noqa: F401


def _similarities() -> Iterable[str]:
    from nnunet_oneshot.registration.pair.similarities import SIMILARITIES

    return SIMILARITIES


def _propagation_methods() -> Iterable[str]:
    from nnunet_oneshot.evaluation.propagation import propagation_methods

    return propagation_methods()


def _add_dataset(parser: argparse.ArgumentParser, configuration: str | None = None) -> None:
    """-d, -c and -p as nnU-Net names them; -c is required where it has no default."""
    parser.add_argument("-d", required=True, metavar="DATASET", help="dataset number or name")
    default = "such as 3d_fullres" if configuration is None else f"default: {configuration}"
    parser.add_argument(
        "-c",
        required=configuration is None,
        default=configuration,
        metavar="CONFIGURATION",
        help=f"configuration ({default})",
    )
    parser.add_argument(
        "-p", default="nnUNetOneShotPlans", metavar="PLANS", help="name of the plans (default: %(default)s)"
    )


def _add_device(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "-device", "--device", default="cpu", help=f"where {what}: cpu, cuda or mps (default: %(default)s)"
    )


def _add_guide(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--guide",
        metavar="MODEL_FOLDER",
        help="trained model (TRAINER__PLANS__CONFIGURATION in nnUNet_results) with a finished training of the same "
        "fold, whose segmentations of the images guide the registration (default: the plans', which name none)",
    )


def _benchmark(options: argparse.Namespace) -> None:
    from nnunet_oneshot.evaluation.benchmark import run_benchmark

    _load_registries()
    run_benchmark(
        dataset=options.d,
        out=options.o,
        atlases=options.atlas,
        folds=options.fold,
        seeds=options.seed,
        methods=options.methods,
        plans_name=options.p,
        configuration=options.c,
        epochs=options.epochs,
        settings=options.set,
        device=options.device,
    )


def _add_benchmark(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "benchmark",
        help="compare methods on identical cases and budgets",
        description="Runs methods through nnU-Net's own training and evaluation and writes results.json, summary.csv, "
        "summary.md and figures. What is finished is skipped when the command is given again.",
    )
    _add_dataset(parser, configuration="3d_fullres")
    parser.add_argument("-o", required=True, metavar="OUT", help="folder of the benchmark")
    parser.add_argument("--atlas", nargs="+", metavar="CASE", help="atlases, each for its own runs (default: chosen)")
    parser.add_argument(
        "--fold", nargs="+", type=_fold_number, default=["0"], metavar="FOLD", help="folds to score (default: 0)"
    )
    parser.add_argument("--seed", nargs="+", type=int, metavar="SEED", help="seeds of the trainings (default: plans')")
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help="affine registration corrected syn nnunet-atlas supervised-atlas propagation synthesis distill supervised "
        "nnunet-full (default: those of them that can run), another peer, or one of them with an ablation or other "
        "settings: distill:no-hint, distill:unlabelled_fraction=0.2",
    )
    parser.add_argument("--epochs", type=int, metavar="N", help="length of every training, 250 iterations an epoch")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the oneshot block for all methods"
    )
    _add_device(parser, "the networks are trained")
    parser.set_defaults(run=_benchmark)


def _demo(options: argparse.Namespace) -> None:
    from nnunet_oneshot.demo.run import run_demo

    run_demo(options.out)


def _add_demo(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "demo",
        help="run every step on generated phantoms and write a page with pictures and numbers",
        description="Generates a small dataset of anatomical phantoms of which one is labelled, plans, registers, "
        "trains, predicts and scores it through the commands a user would type (printed as they run), and writes "
        "report.html. Takes about 5 minutes on two idle CPU cores.",
    )
    parser.add_argument(
        "--out",
        default="nnunet_oneshot_demo",
        help="a new folder, or that of a previous demo, which is replaced (default: ./nnunet_oneshot_demo)",
    )
    parser.set_defaults(run=_demo)


def _doctor(options: argparse.Namespace) -> None:
    from nnunet_oneshot.doctor import examine

    examine(dataset=options.d, configuration=options.c, plans_name=options.p)


def _add_doctor(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="tell whether machine and dataset are ready for training, and what to type next",
        description="Looks at versions, variables, folders, worker settings, trainers and GPU, and with -d at a "
        "dataset: its files, plans, preprocessed cases and registrations. Says what to type next. The exit status is "
        "0 where training can begin.",
    )
    parser.add_argument("-d", metavar="DATASET", help="dataset number or name")
    parser.add_argument("-c", metavar="CONFIGURATION", help="configuration (default: one that is preprocessed)")
    parser.add_argument("-p", metavar="PLANS", help="name of the plans (default: the newest for one-shot training)")
    parser.set_defaults(run=_doctor)


def _env(_: argparse.Namespace) -> None:
    from nnunet_oneshot.environment import shell_export

    print(shell_export())


def _add_env(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "env",
        help="print the line that makes nnU-Net find the trainers where installing did not",
        description='Prints an export of nnUNet_extTrainer for the shell: eval "$(nnunet_oneshot env)". '
        "What the variable already lists is kept. Installing the package does the same whenever Python starts.",
    )
    parser.set_defaults(run=_env)


def _export(options: argparse.Namespace) -> None:
    from nnunet_oneshot.export import export_model

    export_model(
        dataset=options.d,
        configuration=options.c,
        plans_name=options.p,
        trainer=options.tr,
        folds=options.f,
        images=options.i,
        out=options.o,
        device=options.device,
    )


def _add_export(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "export",
        help="write a trained model that stock nnU-Net predicts with",
        description="Writes a trained model under the name of stock nnU-Net's trainer, for use where this package is "
        "not installed, and checks that it predicts what the original predicts.",
    )
    _add_dataset(parser)
    parser.add_argument("-tr", required=True, metavar="TRAINER", help="the trainer the model was trained with")
    parser.add_argument(
        "-f", nargs="+", type=_fold, metavar="FOLD", help="folds to export (default: every finished one)"
    )
    parser.add_argument(
        "-o",
        required=True,
        metavar="OUT",
        help="the model folder to make, or a .zip for nnUNetv2_install_pretrained_model_from_zip",
    )
    parser.add_argument("-i", metavar="FOLDER", help="images on which both models are compared (default: generated)")
    _add_device(parser, "the comparison runs")
    parser.set_defaults(run=_export)


def _import(options: argparse.Namespace) -> None:
    from nnunet_oneshot.data.import_scans import import_scans

    import_scans(
        options.folder,
        dataset=options.d,
        labels=options.label,
        label_names=options.labels,
        channels=options.channels,
        test_folder=options.test,
        num_processes=options.np,
    )


def _add_import(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "import",
        help="make a raw data set from a folder of scans, DICOM included, and one label",
        description="Writes nnU-Net's raw format: imagesTr, labelsTr, dataset.json, and oneshot_sources.csv, which "
        "tells where each case came from. Takes DICOM series, NIfTI, NRRD, MetaImage and FreeSurfer's MGZ, also in "
        "folders below. Scans that cannot be read are left out and told.",
    )
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="holds the scans")
    add("-d", required=True, metavar="DATASET", help="number, or name such as Dataset005_Liver, of the new data set")
    add(
        "--label",
        nargs=2,
        action="append",
        required=True,
        metavar=("CASE", "FILE"),
        help="a scan's name and its label map (DICOM-SEG with the extra dicom); may be given several times",
    )
    add("--labels", nargs="+", metavar="NAME", help="names of the labels, by value (default: those in the file)")
    add("--channels", nargs="+", metavar="NAME", help="what the channels show, such as CT (default: DICOM's modality)")
    add("--test", metavar="FOLDER", help="scans for imagesTs")
    add("-np", type=int, metavar="N", help="processes (default: nnUNet_def_n_proc, else up to 8)")
    parser.set_defaults(run=_import)


def _plan_and_preprocess(options: argparse.Namespace) -> None:
    import nnunet_oneshot.planners as planners
    from nnunet_oneshot.data.options import DEFAULT_CONFIGURATIONS, Options
    from nnunet_oneshot.data.plan_and_preprocess import plan_and_preprocess
    from nnunet_oneshot.training_time import tell_training_time

    _load_registries()
    if options.pl not in planners.__all__:
        raise OneShotError(f"Unknown planner {options.pl!r}: known are {', '.join(planners.__all__)}.")
    configurations = options.c or DEFAULT_CONFIGURATIONS
    for dataset in options.d:
        plans_file = plan_and_preprocess(
            dataset,
            getattr(planners, options.pl),
            Options(
                atlases=options.atlas,
                configurations=configurations,
                num_processes=options.np,
                num_processes_fingerprint=options.npfp,
                verify=options.verify,
                clean=options.clean,
                no_preprocessing=options.no_pp,
                gpu_memory_target=options.gpu_memory_target,
                plans_name=options.overwrite_plans_name,
                target_spacing=options.overwrite_target_spacing,
                verbose=options.verbose,
                progress=not options.no_pbar,
            ),
        )
        if not (options.no_pp or options.no_estimate):
            tell_training_time(dataset, plans_file, configurations)


def _add_plan_and_preprocess(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "plan_and_preprocess",
        help="check, plan and preprocess a raw data set of which as few as one case is labelled",
        description="Checks every image of a raw data set and the atlas's label, extracts a fingerprint that opens no "
        "other label, plans and preprocesses. Options are named as those of nnUNetv2_plan_and_preprocess.",
    )
    add = parser.add_argument
    add("-d", nargs="+", required=True, metavar="DATASET", help="numbers or names of data sets in nnUNet_raw")
    add("--atlas", nargs="+", metavar="CASE", help="labelled cases to warp; default: oneshot_atlas.json, else chosen")
    add(
        "-c", nargs="+", metavar="CONFIGURATION", help="configurations; default: 2d 3d_fullres 3d_lowres, where planned"
    )
    add("-pl", default="OneShotPlanner", metavar="PLANNER", help="planner class; default: %(default)s")
    add("-np", nargs="+", type=int, metavar="N", help="processes for preprocessing, one number or one a configuration")
    add("-npfp", type=int, metavar="N", help="processes for reading all images")
    add(
        "--verify_dataset_integrity",
        "--verify",
        dest="verify",
        action="store_true",
        help="also read the labels of all other cases, to report bad ones (images and the atlas are always checked)",
    )
    add("--clean", action="store_true", help="read all images again even where nothing has changed")
    add("--no_pp", action="store_true", help="stop after planning")
    add("--no_estimate", action="store_true", help="do not time some iterations to tell how long a training takes")
    add("-gpu_memory_target", type=float, metavar="GB", help="GPU memory for the whole training")
    add("-overwrite_plans_name", metavar="NAME", help="name of the plans; default: the planner's")
    add(
        "-overwrite_target_spacing",
        nargs="+",
        type=float,
        metavar="MM",
        help="spacing of 3d_fullres; default: nnU-Net's, or coarser for a wider view",
    )
    add("--verbose", action="store_true", help="print everything that nnU-Net's planner and preprocessor print")
    add("--no_pbar", action="store_true", help="show no progress bars")
    parser.set_defaults(run=_plan_and_preprocess)


def _preprocess(options: argparse.Namespace) -> None:
    from nnunet_oneshot.data.options import DEFAULT_CONFIGURATIONS, Options
    from nnunet_oneshot.data.plan_and_preprocess import plan_and_preprocess

    _load_registries()
    plan_and_preprocess(
        options.d,
        None,
        Options(
            atlases=options.atlas,
            configurations=options.c or DEFAULT_CONFIGURATIONS,
            num_processes=options.np,
            plans_name=options.plans_name,
            verbose=options.verbose,
            progress=not options.no_pbar,
        ),
    )


def _add_preprocess(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "preprocess",
        help="preprocess with existing plans, such as those of another data set",
        description="Preprocesses a raw data set with plans that lie in its folder in nnUNet_preprocessed, for example "
        "after nnUNetv2_move_plans_between_datasets. Options are named as those of nnUNetv2_preprocess.",
    )
    add = parser.add_argument
    add("-d", required=True, metavar="DATASET", help="number or name of a data set in nnUNet_raw")
    add("-plans_name", "-p", required=True, metavar="PLANS", help="name of the plans")
    add(
        "-c", nargs="+", metavar="CONFIGURATION", help="configurations; default: 2d 3d_fullres 3d_lowres, where planned"
    )
    add("-np", nargs="+", type=int, metavar="N", help="processes, one number or one a configuration")
    add("--atlas", nargs="+", metavar="CASE", help="labelled cases to warp; default: oneshot_atlas.json, else chosen")
    add("--verbose", action="store_true", help="print everything that nnU-Net's preprocessor prints")
    add("--no_pbar", action="store_true", help="show no progress bars")
    parser.set_defaults(run=_preprocess)


def _propagate(options: argparse.Namespace) -> None:
    from nnunet_oneshot.evaluation.propagation import propagate

    _load_registries()
    propagate(
        dataset=options.d,
        configuration=options.c,
        plans_name=options.p,
        fold=options.f,
        images=options.i,
        out=options.o,
        method=options.method,
        guide=options.guide,
        student=options.student,
        device=options.device,
    )


def _add_propagate(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "propagate",
        help="segment by label propagation: the baseline without a network",
        description="Registers the atlas to the validation cases of a fold (scored where they have labels) or to new "
        "images, and writes the warped labels in the original grid of each image.",
    )
    _add_dataset(parser)
    parser.add_argument(
        "-f", type=_fold, default="0", metavar="FOLD", help="whose atlas and validation cases (default: 0)"
    )
    parser.add_argument("-i", metavar="FOLDER", help="images to segment instead of validation cases")
    parser.add_argument("-o", required=True, metavar="FOLDER", help="where the segmentations are written")
    parser.add_argument(
        "--method",
        type=_one_of(_propagation_methods, default="registration"),
        metavar="NAME",
        default="registration",
        help="registration (of this package), corrected (the same with labels corrected by each image's intensities as "
        "training does), affine (its first stage), or a peer such as syn (default: registration)",
    )
    _add_guide(parser)
    parser.add_argument(
        "--student",
        metavar="MODEL_FOLDER",
        help="with --method corrected: trained model with a finished training of the same fold, whose probabilities "
        "are fused with the corrected labels (default: none)",
    )
    _add_device(parser, "the registration runs")
    parser.set_defaults(run=_propagate)


def _register(options: argparse.Namespace) -> None:
    from nnunet_oneshot.registration.dataset.command import register

    _load_registries()
    register(
        dataset=options.d,
        configuration=options.c,
        plans_name=options.p,
        folds=options.f,
        device=options.device,
        figures=not options.no_figures,
        guide=options.guide,
        num_processes=options.np,
        num_parts=options.num_parts,
        part_id=options.part_id,
        scheduler=options.scheduler,
    )


def _add_register(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "register",
        help="register the atlas to all cases ahead of training, with a picture of each",
        description="Registers the atlas of each fold to all other cases from images alone. Results are kept beside "
        "the preprocessed data and resumed after an interruption; training uses them, and computes what is missing.",
    )
    _add_dataset(parser)
    parser.add_argument("-f", nargs="+", type=_fold, default=["0"], metavar="FOLD", help="folds (default: 0)")
    _add_device(parser, "the deformable stage runs")
    parser.add_argument("--no_figures", action="store_true", help="draw no pictures")
    _add_guide(parser)
    add = parser.add_argument
    add("-np", type=int, metavar="N", help="processes (default: nnUNet_def_n_proc, else up to 8)")
    add("-num_parts", "--num_parts", type=int, default=1, metavar="N", help="of a job array (default: 1)")
    add("-part_id", "--part_id", type=int, default=0, metavar="K", help="the part to register, 0 to N - 1 (default: 0)")
    add("--scheduler", metavar="ADDRESS", help="a dask cluster that registers instead of this machine")
    parser.set_defaults(run=_register)


def _register_pair(options: argparse.Namespace) -> None:
    from nnunet_oneshot.config import RegistrationConfig
    from nnunet_oneshot.registration.files.register_pair import register_pair

    register_pair(
        options.fixed,
        options.moving,
        out=options.o,
        labels=options.labels,
        config=RegistrationConfig(method="refine", similarity=options.similarity),
        device=options.device,
    )


def _add_register_pair(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "register-pair",
        help="register two image files, without any nnU-Net folder",
        description="Warps MOVING onto the grid of FIXED and writes warped.nii.gz, warped_labels.nii.gz, "
        "displacement.nii.gz (mm, for SimpleITK's DisplacementFieldTransform), quality.json and figure.png. The images "
        "may differ in grid, spacing, orientation and field of view. Join the channels of an image by commas: "
        "t1.nii.gz,t2.nii.gz; warped_0000.nii.gz, warped_0001.nii.gz are written then.",
    )
    parser.add_argument("fixed", metavar="FIXED", help="image that stays, 2D or 3D")
    parser.add_argument("moving", metavar="MOVING", help="image that is warped onto it")
    parser.add_argument("--labels", metavar="MOVING_LABELS", help="label map of the moving image, on its grid")
    parser.add_argument("-o", required=True, metavar="OUT", help="folder to make")
    parser.add_argument(
        "--similarity",
        type=_one_of(_similarities, default="lncc"),
        metavar="NAME",
        default="lncc",
        help="what is maximised; mind or nmi for images of different contrast (default: lncc)",
    )
    _add_device(parser, "the deformable stage runs")
    parser.set_defaults(run=_register_pair)


def _report(options: argparse.Namespace) -> None:
    from nnunet_oneshot.report.command import report

    _load_registries()
    report(
        dataset=options.d,
        configuration=options.c,
        plans_name=options.p,
        fold=options.f,
        trainer=options.tr,
        out=options.o,
        ratings=options.ratings,
    )


def _add_report(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "report",
        help="write a page about registrations and training of your own data",
        description="Writes one HTML page that needs no network: all registrations of a fold with cuts, scores and "
        "ratings, patches as training makes them and, after training, its curves, scores and predictions.",
    )
    _add_dataset(parser, configuration="3d_fullres")
    add = parser.add_argument
    add("-f", type=_fold, default="0", metavar="FOLD", help="the fold (default: 0)")
    add(
        "-tr",
        default="OneShotDistillTrainer",
        metavar="TRAINER",
        help="whose training is shown, if there is one (default: %(default)s)",
    )
    add("-o", default="report.html", metavar="FILE", help="the page (default: ./report.html)")
    add("--ratings", metavar="FILE", help="ratings that such a page exported, which are kept beside the plans first")
    parser.set_defaults(run=_report)


def _statistics(options: argparse.Namespace) -> None:
    from nnunet_oneshot.evaluation.volumes import write_statistics

    write_statistics(options.i, out=options.o, images=options.images, num_processes=options.np)


def _add_statistics(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "statistics",
        help="write a table of the volumes of segmented structures",
        description="Writes a CSV table with one line a case and label: voxels, volume (ml), whether the structure "
        "touches the border of the image, and with --images the mean value of each channel in it.",
    )
    add = parser.add_argument
    add("-i", required=True, metavar="FOLDER", help="segmentations, with the dataset.json that prediction leaves there")
    add("-o", metavar="FILE", help="the table (default: statistics.csv in the folder)")
    add("--images", metavar="FOLDER", help="the images that were segmented, in nnU-Net's naming")
    add("-np", type=int, metavar="N", help="processes (default: nnUNet_def_n_proc, else up to 8)")
    parser.set_defaults(run=_statistics)


def _suggest_next(options: argparse.Namespace) -> None:
    from nnunet_oneshot.registration.dataset.agreement import StudentRun
    from nnunet_oneshot.registration.dataset.suggestion import suggest_next

    if options.d is None:
        raise OneShotError("--next needs a dataset, whose labelsTr says what is labelled: give -d instead of -i.")
    student = None
    if options.student is not None:
        _load_registries()
        student = StudentRun(options.student, options.d, options.p, options.c, options.f, options.device)
    suggest_next(dataset=options.d, student=student, out=options.o, num_processes=options.np)


def _suggest_atlas(options: argparse.Namespace) -> None:
    from nnunet_oneshot.registration.dataset.suggestion import suggest_atlas

    if options.next:
        _suggest_next(options)
        return
    if options.student is not None:
        raise OneShotError("--student goes with --next alone: a scan to be labelled first has no student yet.")
    suggest_atlas(
        dataset=options.d,
        images=options.i,
        file_ending=options.file_ending,
        out=options.o,
        num_processes=options.np,
    )


def _add_suggest_atlas(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "suggest-atlas",
        help="rank scans by how well they represent the others: which one to label",
        description="Aligns small copies of all images and ranks the cases by their mean correlation to the others. "
        "Opens no label. Prints the ranking and writes atlas_ranking.csv, atlas_ranking.json and atlas_ranking.png, "
        "a picture of the most and the least typical cases. With --next it ranks the unlabelled cases by what their "
        "label would add to those in labelsTr, whose names alone are read, and writes next_ranking.csv, .json "
        "and .png.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("-d", metavar="DATASET", help="dataset number or name in nnUNet_raw")
    source.add_argument("-i", metavar="FOLDER", help="folder of images, before there is any dataset.json")
    parser.add_argument(
        "--file_ending", default=".nii.gz", metavar="SUFFIX", help="of the images with -i (default: %(default)s)"
    )
    parser.add_argument("-o", default=".", metavar="FOLDER", help="where the ranking is written (default: here)")
    add = parser.add_argument
    add("-np", type=int, metavar="N", help="processes (default: nnUNet_def_n_proc, else up to 8)")
    add("--next", action="store_true", help="rank what to label next, given what is labelled in the dataset")
    add(
        "--student",
        metavar="MODEL_FOLDER",
        help="with --next: trained model (TRAINER__PLANS__CONFIGURATION in nnUNet_results), whose disagreement with "
        "registration then counts too (default: images alone)",
    )
    add("-c", default="3d_fullres", metavar="CONFIGURATION", help="of the student (default: %(default)s)")
    add("-p", default="nnUNetOneShotPlans", metavar="PLANS", help="of the student (default: %(default)s)")
    add("-f", type=_fold, default="0", metavar="FOLD", help="of the student (default: 0)")
    _add_device(parser, "the student runs")
    parser.set_defaults(run=_suggest_atlas)


def _to_dicom(options: argparse.Namespace) -> None:
    from nnunet_oneshot.evaluation.dicom_export import write_dicom_segmentations

    write_dicom_segmentations(options.i, scans=options.scans, out=options.o)


def _add_to_dicom(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser(
        "to-dicom",
        help="write segmentations of imported DICOM series as DICOM-SEG",
        description="Writes one DICOM-SEG file a case, for viewers and archives. Needs the extra dicom.",
    )
    add = parser.add_argument
    add("-i", required=True, metavar="FOLDER", help="segmentations, with the dataset.json that prediction leaves there")
    add("--scans", required=True, metavar="FOLDER", help="the DICOM series, as given to `nnunet_oneshot import`")
    add("-o", required=True, metavar="FOLDER", help="where CASE.dcm are written")
    parser.set_defaults(run=_to_dicom)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command, one subparser for each subcommand."""
    parser = argparse.ArgumentParser(
        prog="nnunet_oneshot",
        description="One-shot segmentation for nnU-Net: one labelled volume and a folder of unlabelled ones.",
    )
    parser.add_argument("--version", action="version", version=f"nnunet_oneshot {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_benchmark(subparsers)
    _add_demo(subparsers)
    _add_doctor(subparsers)
    _add_env(subparsers)
    _add_export(subparsers)
    _add_import(subparsers)
    _add_plan_and_preprocess(subparsers)
    _add_preprocess(subparsers)
    _add_propagate(subparsers)
    _add_register(subparsers)
    _add_register_pair(subparsers)
    _add_report(subparsers)
    _add_statistics(subparsers)
    _add_suggest_atlas(subparsers)
    _add_to_dicom(subparsers)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: Command line arguments without the program's name, or None: those of the process.

    Returns:
        The exit status: 0, 1 after an error that the user can mend, or 130 after Ctrl-C.
    """
    # Other packages tell their developers what will change.
    warnings.filterwarnings("ignore", category=FutureWarning)
    failed = exit_status(load_modules)
    if failed:
        return failed
    options = build_parser().parse_args(arguments)
    dataset = getattr(options, "d", None)
    # Planning takes several.
    return exit_status(lambda: options.run(options), dataset=dataset[0] if isinstance(dataset, list) else dataset)


if __name__ == "__main__":
    sys.exit(main())
