"""Where each component runs and in which precision: what was asked, checked against the machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from holdfast.engine.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    import openvino as ov

    from holdfast.engine.requests.config import EngineConfig

PRECISION = "INFERENCE_PRECISION_HINT"
PRIMITIVES = "CPU_RUNTIME_CACHE_CAPACITY"
KEPT_PRIMITIVES = 50
"""
Kernels of each kind that one compiled graph keeps for shapes that it has seen; OpenVINO keeps 5000.

They are outside every budget, and each further size makes some of its own. On the demo model 300
sizes leave 1.6 GB with OpenVINO's bound, 0.1 GB with 200 and half of that with 50, in no
more CPU seconds than with 200. At Stable Diffusion 1.5's size 200 bounds nothing after 12 sizes.
See docs/performance.md.
"""
_VIRTUAL = ("AUTO", "HETERO", "MULTI", "BATCH")
_CAPABILITIES = {"f32": "FP32", "f16": "FP16", "bf16": "BF16"}


def is_physical(device: str) -> bool:
    """Tell whether `device` is hardware, and none of OpenVINO's ways to choose among hardware."""
    return device.partition(":")[0] not in _VIRTUAL


def check_components(config: EngineConfig, components: Collection[str]) -> None:
    """
    Make sure that each device is asked for a component that there is.

    Raises:
        InvalidRequest: One is not; the text lists those that there are.
    """
    asked = config.device if isinstance(config.device, dict) else {}
    unknown = sorted(set(asked).difference(components))
    if unknown:
        msg = (
            f"A device was asked for {', '.join(unknown)}, but this model has no such component; "
            f"it has {', '.join(components)}. Correct the name."
        )
        raise InvalidRequest(msg)


def physical_devices(core: ov.Core, device: str) -> tuple[str, ...]:
    """
    Return the physical devices that `device` may run on.

    Raises:
        InvalidRequest: OpenVINO sees no such device here; the text lists those it sees.
    """
    available = tuple(core.available_devices)
    name, _, rest = device.partition(":")
    if is_physical(device):
        wanted: tuple[str, ...] = (name.partition("(")[0],)
    else:
        parts = (part.partition("(")[0].strip() for part in rest.split(","))
        wanted = tuple(part for part in parts if part and not part.startswith("-")) or available
    missing = [
        one
        for one in wanted
        if one not in available and not any(seen.startswith(f"{one}.") for seen in available)
    ]
    if missing:
        msg = (
            f"Device {device!r} was asked for, but OpenVINO sees no {', '.join(missing)} here; it "
            f"sees {', '.join(available)}. Choose one of these, or install the driver and ask "
            "`holdfast doctor`."
        )
        raise InvalidRequest(msg)
    return wanted


def told_device(core: ov.Core, device: str) -> dict[str, Any]:
    """Return what OpenVINO tells of a physical device: its full name, its driver and its plugin."""
    known = [str(name) for name in core.get_property(device, "SUPPORTED_PROPERTIES")]
    drivers = [name for name in known if name.endswith("DRIVER_VERSION")]  # none for a CPU
    plugins = core.get_versions(device).values()
    return {
        "device": device,
        "name": str(core.get_property(device, "FULL_DEVICE_NAME")),
        "driver": ", ".join(str(core.get_property(device, name)) for name in drivers) or None,
        "plugin": ", ".join(str(plugin.build_number) for plugin in plugins) or None,
    }


def effective_properties(
    config: EngineConfig, component: str, core: ov.Core, *, overflows: bool = False
) -> tuple[tuple[str, str], ...]:
    """
    Return every OpenVINO property that one component is compiled with, sorted by name.

    The precision is always among them, also where the device's default was asked for, and so is
    the bound on what a CPU keeps for each size. Where the default is float16, a component that
    `overflows` there gets float32.

    Raises:
        InvalidRequest: The device does not exist, or cannot compute in the precision asked for.
    """
    device = config.device_of(component)
    first = physical_devices(core, device)[0]
    asked = config.precision if config.precision in _CAPABILITIES else "auto"
    given: Mapping[str, object] = config.properties
    if asked == "auto":
        default = _default_precision(core, first)
        if overflows and default == "f16":
            default = "f32"
        precision = str(given.get(PRECISION, "")) or default
    else:
        precision = asked
        capabilities = core.get_property(first, "OPTIMIZATION_CAPABILITIES")
        if _CAPABILITIES[asked] not in capabilities:
            msg = (
                f"precision={asked!r} was asked for, but {first} computes in "
                f"{', '.join(capabilities)} and would silently use another one. Use 'auto' "
                f"(here: {_default_precision(core, first)}) or 'f32'."
            )
            raise InvalidRequest(msg)
    own = {PRIMITIVES: str(KEPT_PRIMITIVES)} if device == "CPU" else {}
    merged = own | {name: _text(value) for name, value in given.items()} | {PRECISION: precision}
    return tuple(sorted(merged.items()))


def wants_static_shapes(config: EngineConfig, denoiser: str, core: ov.Core) -> bool:
    """Decide ``shapes="auto"``: a CPU serves every size with one graph, others gain by static."""
    if config.shapes != "auto":
        return config.shapes == "static"
    return any(one != "CPU" for one in physical_devices(core, config.device_of(denoiser)))


def in_force(compiled: ov.CompiledModel, name: str) -> str:
    """Read a property back; a virtual device such as AUTO knows it only of those beneath it."""
    try:
        value = compiled.get_property(name)
    except RuntimeError:
        beneath = compiled.get_property("DEVICE_PROPERTIES")
        values = (_plain(each[name]) for each in beneath.values() if name in each)
        return ",".join(dict.fromkeys(values)) or "unknown"
    return _plain(value)


def _default_precision(core: ov.Core, device: str) -> str:
    default: ov.Type = core.get_property(device, PRECISION)
    return str(default.to_string())


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "YES" if value else "NO"
    return str(value)


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return value.get_type_name() if hasattr(value, "get_type_name") else str(value)
