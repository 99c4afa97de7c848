//! How bytes move: slices leave in turns, and land.

use kvferry_core::Direction;
use kvferry_transport::TransferError;

use crate::copy::{put, take};
use crate::due::Due;
use crate::fabric::{Delivery, NicId};
use crate::flow::{FlowId, INITIATOR, Slice, Stage, Stop};
use crate::link::LinkId;
use crate::nic::{Health, NicState};
use crate::shadow::Content;
use crate::state::{State, nanos};
use crate::transfers::completion_error;

/// Buffers that are kept for later slices.
const SPARE_MAX: usize = 256;

impl State {
    /// Queues a transfer for its source's wire, or ends it when all of it has landed.
    pub(crate) fn offer(&mut self, id: FlowId) {
        let window = self.options.window;
        let Some(flow) = self.flows.get_mut(id.0) else { return };
        if flow.is_whole() {
            return self.complete(id);
        }
        if flow.queued || !flow.wants_out(window) {
            return;
        }
        flow.queued = true;
        let source = flow.nics[flow.source()];
        if let Some(nic) = self.nic_mut(source) {
            nic.egress.push_back(id);
        }
        self.egress(source);
    }

    /// Lets slices leave one NIC, as long as its wire is free.
    pub(crate) fn egress(&mut self, nic: NicId) {
        let window = self.options.window;
        loop {
            let now = self.now;
            let Some(state) = self.nic_mut(nic).filter(|state| state.health == Health::Up) else { return };
            if now < state.out_free_at {
                break;
            }
            let Some(id) = state.egress.pop_front() else { return };
            if self.flows.get(id.0).is_some_and(|flow| flow.wants_out(window)) {
                self.depart(id);
            }
            let Some(flow) = self.flows.get_mut(id.0) else { continue };
            flow.queued = flow.wants_out(window);
            if flow.queued
                && let Some(state) = self.nic_mut(nic)
            {
                state.egress.push_back(id);
            }
        }
        if let Some(state) = self.nic_mut(nic)
            && !state.egress.is_empty()
            && !std::mem::replace(&mut state.egress_armed, true)
        {
            let at = state.out_free_at;
            self.at(at, Due::Egress { nic });
        }
    }

    fn depart(&mut self, id: FlowId) {
        let now = self.now;
        let Some(flow) = self.flows.get(id.0) else { return };
        let (source, destination) = (flow.nics[flow.source()], flow.nics[flow.destination()]);
        let limit = |nic: NicId| self.nic(nic).map(|state| state.options.poll_bytes_max);
        let limits = [limit(source), limit(destination)];
        let budget = limits.into_iter().flatten().fold(self.options.slice_bytes, u64::min).max(1);
        let jitter = nanos(self.options.jitter);
        let jitter = if jitter == 0 { 0 } else { self.jitter.below(jitter.saturating_add(1)) };

        let mut bytes = self.spare.pop().unwrap_or_default();
        let Some(flow) = self.flows.get_mut(id.0) else { return };
        let Stage::Running(running) = &mut flow.stage else { return };
        let (part, size) = running.next_slice(budget);
        let (from, _) = running.pools(flow.transfer.direction, &flow.local);
        let taken = if self.options.move_bytes { take(&running.source, part, from, &mut bytes) } else { Ok(()) };
        let content = match (&self.shadow, &running.watched) {
            (Some(shadow), Some(watched)) => shadow.content(watched, &running.source, part),
            _ => Content::Nothing,
        };
        if let Err(error) = taken {
            self.recycle(bytes);
            return self.stop(id, Stop { at_initiator: error.clone(), at_owner: error });
        }
        flow.in_flight += 1;
        flow.times.first_left.get_or_insert(now);

        let mut lands = self.cross(source, destination, size).saturating_add(jitter);
        if self.options.delivery == Delivery::Ordered
            && let Some(flow) = self.flows.get_mut(id.0)
        {
            lands = lands.max(flow.last_at);
            flow.last_at = lands;
        }
        let slice = self.slices.insert(Slice { flow: id, part, size, bytes, content });
        self.at(lands, Due::Slice { slice });
    }

    /// Takes both ends' wires for so many bytes that leave now; returns when the last of them lands.
    fn cross(&mut self, source: NicId, destination: NicId, size: u64) -> u64 {
        let (now, speed) = (self.now, self.options.bytes_per_second);
        let mut out = 0;
        if let Some(nic) = self.nic_mut(source) {
            out = on_wire(size, speed, nic);
            nic.out_free_at = now.saturating_add(out);
            nic.stats.busy_out_ns = nic.stats.busy_out_ns.saturating_add(out);
            nic.stats.bytes_out += size;
            nic.stats.in_flight_out += size;
        }
        let mut lands = now.saturating_add(self.latency()).saturating_add(out);
        if let Some(nic) = self.nic_mut(destination) {
            let inward = on_wire(size, speed, nic);
            // Its first byte may come while the wire still brings other slices; its last comes when the slower of both ends is through.
            lands = lands.saturating_add(inward.saturating_sub(out)).max(nic.in_free_at.saturating_add(inward));
            nic.in_free_at = lands;
            nic.stats.busy_in_ns = nic.stats.busy_in_ns.saturating_add(inward);
            nic.stats.in_flight_in += size;
        }
        lands
    }

    /// A slice is at its destination.
    pub(crate) fn landed(&mut self, slice: u64) {
        let Some(slice) = self.arrive(slice) else { return };
        let id = slice.flow;
        let Some(flow) = self.flows.get_mut(id.0) else { return };
        let end = flow.destination();
        if flow.lost {
            self.recycle(slice.bytes);
            return self.let_go(id);
        }
        if flow.over[end] {
            return self.refuse_slice(slice);
        }
        let Stage::Running(running) = &flow.stage else { return };
        let (direction, nic) = (flow.transfer.direction, flow.nics[end]);
        if let (Some(shadow), Some(watched)) = (&mut self.shadow, &running.watched) {
            shadow.write(
                self.now,
                nic,
                flow.transfer.id.handover(),
                watched,
                &running.destination,
                slice.part,
                slice.content,
            );
        }
        let (_, to) = running.pools(direction, &flow.local);
        let written =
            if self.options.move_bytes { put(&running.destination, slice.part, to, &slice.bytes) } else { Ok(1) };
        flow.landed += 1;
        flow.times.last_landed = self.now;
        let fails = running.fails_after.is_some_and(|after| flow.landed >= after && !running.left.is_empty());
        if let Ok(pieces) = &written {
            flow.pieces += pieces;
            flow.landed_bytes += slice.size;
        }
        if let Some(nic) = self.nic_mut(nic) {
            nic.stats.bytes_in += slice.size;
        }
        self.recycle(slice.bytes);
        if let Err(error) = written {
            self.stop(id, Stop { at_initiator: error.clone(), at_owner: error });
        } else if fails {
            self.stop(id, Stop { at_initiator: completion_error(), at_owner: completion_error() });
        }
        self.go_on(id);
    }

    /// After one slice fewer is on its way.
    fn go_on(&mut self, id: FlowId) {
        let Some(flow) = self.flows.get(id.0) else { return };
        match (flow.stop.is_some(), flow.in_flight) {
            (true, 0) => self.finish_stopped(id),
            (true, _) => {}
            (false, _) => self.offer(id),
        }
        self.let_go(id);
    }

    /// The end that it is for is over: its NIC drops it, and says so.
    fn refuse_slice(&mut self, slice: Slice) {
        let id = slice.flow;
        self.recycle(slice.bytes);
        let Some(flow) = self.flows.get_mut(id.0) else { return };
        let (nic, is_pull) = (flow.nics[flow.destination()], flow.transfer.direction == Direction::Pull);
        let tell = !is_pull && !flow.over[INITIATOR] && !std::mem::replace(&mut flow.told, true);
        if let Some(nic) = self.nic_mut(nic) {
            nic.stats.slices_dropped += 1;
        }
        if tell {
            self.tell(id, INITIATOR, TransferError::Refused("the receiver takes nothing more of it".to_owned()));
        }
        self.go_on(id);
    }

    /// A slice never arrives; returns its link.
    pub(crate) fn drop_slice(&mut self, slice: u64) -> Option<LinkId> {
        let slice = self.arrive(slice)?;
        self.recycle(slice.bytes);
        let link = self.flows.get(slice.flow.0).map(|flow| flow.link);
        if let Some(link) = link {
            // First of all: whoever has ended needs no further slice.
            self.break_off(link);
        }
        self.go_on(slice.flow);
        link
    }

    /// Takes a slice off the wire.
    fn arrive(&mut self, slice: u64) -> Option<Slice> {
        let slice = self.slices.remove(slice)?;
        let flow = self.flows.get_mut(slice.flow.0)?;
        flow.in_flight = flow.in_flight.saturating_sub(1);
        let (source, destination) = (flow.nics[flow.source()], flow.nics[flow.destination()]);
        if let Some(nic) = self.nic_mut(source) {
            nic.stats.in_flight_out = nic.stats.in_flight_out.saturating_sub(slice.size);
        }
        if let Some(nic) = self.nic_mut(destination) {
            nic.stats.in_flight_in = nic.stats.in_flight_in.saturating_sub(slice.size);
        }
        Some(slice)
    }

    fn recycle(&mut self, bytes: Vec<u8>) {
        if self.spare.len() < SPARE_MAX {
            self.spare.push(bytes);
        }
    }
}

/// Nanoseconds that so many bytes take on a NIC's wire.
fn on_wire(bytes: u64, bytes_per_second: u64, nic: &NicState) -> u64 {
    let nanos = u128::from(bytes) * 1_000_000_000 * u128::from(nic.slowness) / u128::from(bytes_per_second.max(1));
    u64::try_from(nanos).unwrap_or(u64::MAX).max(1)
}
